"""The gradient noise scale: how large a batch is worth its examples, from what accumulation holds anyway.

Micro-batch i of N has bᵢ independent items and the mean gradient gᵢ. With B = Σ bᵢ and G = Σ bᵢ·gᵢ / B

    tr Σ̂   = (Σ bᵢ‖gᵢ‖² − B‖G‖²) / (N − 1)      the variance of one item's gradient, over all parameters
    ‖∇L‖²̂ = ‖G‖² − tr Σ̂ / B                      the true gradient's squared norm; one window's may be negative
    noise scale = mean of tr Σ̂ / mean of ‖∇L‖²̂   items

Both are unbiased for micro-batches of any sizes. Their ratio is not, so the two are averaged over windows apart, and
divided last. The equations are plain operators and run on numbers and on tensors.
"""

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bigbatch import errors

# McCandlish et al. 2018 (arXiv 1812.06162): what a batch B costs at the noise scale 𝓑. Marek et al. 2025 (2507.07101).


def estimate(micro_batches: Any, items: Any, squares: Any, square: Any) -> tuple[Any, Any]:
    """One window's (tr Σ̂, ‖∇L‖²̂).

    Args:
        micro_batches: N, those that held items; at least 2.
        items: B = Σ bᵢ.
        squares: Σ bᵢ‖gᵢ‖².
        square: ‖G‖², of the mean gradient over items.
    """
    trace = (squares - items * square) / (micro_batches - 1)
    return trace, square - trace / items


@dataclass(frozen=True, slots=True)
class Noise:
    """What one window says of the noise in its gradient. Plain numbers.

    Attributes:
        micro_batches: how many the estimate is made of: those that held items.
        items: the examples that they counted for.
        trace: tr Σ̂, the variance of one item's gradient, summed over all parameters; NaN from fewer than two.
        squared_norm: ‖∇L‖²̂, which noise may make negative; NaN from fewer than two.
    """

    micro_batches: int
    items: float
    trace: float
    squared_norm: float

    @classmethod
    def of(cls, micro_batches: int, items: float, squares: float, square: float) -> "Noise":
        """From the window's sums, as `estimate` takes them."""
        if micro_batches < 2:  # no variance to see
            return cls(micro_batches, items, math.nan, math.nan)
        return cls(micro_batches, items, *estimate(micro_batches, items, squares, square))


# The running moments: their own weight, its square's, then tr Σ̂, ‖∇L‖²̂, their squares and their product.
EMPTY = (0.0,) * 7


def averaged(moments: Any, trace: Any, squared_norm: Any, decay: float) -> tuple[Any, ...]:
    """The running moments with one more window in them; tr Σ̂ and ‖∇L‖²̂ are averaged apart."""
    new = (1.0, trace, squared_norm, trace * trace, squared_norm * squared_norm, trace * squared_norm)
    weight, squared_weight, *rest = moments
    weight, *rest = (decay * old + (1 - decay) * x for old, x in zip([weight, *rest], new, strict=True))
    return weight, decay**2 * squared_weight + (1 - decay) ** 2, *rest


class NoiseScale:
    """The running noise scale, in items, with its uncertainty.

    Args:
        decay: how much of the average stays at each window. 0.95 looks back over about 40 windows.

    Attributes:
        windows: how many windows it was made of.

    Raises:
        ValueError: `decay` is not a number from 0 to below 1.
    """

    def __init__(self, decay: float = 0.95):
        if isinstance(decay, bool) or not isinstance(decay, numbers.Real) or not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1. {errors.received('decay', decay)}")
        self.decay = float(decay)
        self.windows = 0
        self._moments: tuple[float, ...] = EMPTY

    def add(self, noise: Noise | None) -> None:
        """Takes a window in; one that says nothing (None, one micro-batch, or inf or NaN) is passed over."""
        if noise is not None and math.isfinite(noise.trace) and math.isfinite(noise.squared_norm):
            self._moments = averaged(self._moments, float(noise.trace), float(noise.squared_norm), self.decay)
            self.windows += 1

    @property
    def trace(self) -> float:
        """The variance of one item's gradient, summed over all parameters."""
        return self._mean(2)

    @property
    def squared_norm(self) -> float:
        """The true gradient's squared norm."""
        return self._mean(3)

    @property
    def scale(self) -> float:
        """The noise scale in items: NaN before the first window, inf while the gradient cannot be told from noise."""
        trace, squared_norm = max(self.trace, 0.0) if self.windows else math.nan, self.squared_norm
        if squared_norm > 0:
            return trace / squared_norm
        return math.inf if trace > 0 else math.nan

    @property
    def error(self) -> float:
        """One standard error of `scale`, by the delta method over windows; inf from one window."""
        if not math.isfinite(self.scale):
            return math.inf if self.windows else math.nan
        trace, squared_norm, both = self._variances()
        ratio = self.scale
        variance = (trace - 2 * ratio * both + ratio**2 * squared_norm) / self.squared_norm**2
        return math.sqrt(max(variance, 0.0))

    @property
    def interval(self) -> tuple[float, float]:
        """Where the noise scale lies with about 95 % confidence (Fieller's interval of a ratio); inf where open."""
        if self.windows < 2:
            return (0.0, math.inf) if self.windows else (math.nan, math.nan)
        z2 = 1.96**2
        trace, squared_norm, both = self._variances()
        a = self.squared_norm**2 - z2 * squared_norm
        b = self.trace * self.squared_norm - z2 * both
        c = self.trace**2 - z2 * trace
        root = math.sqrt(max(b * b - a * c, 0.0))
        if a > 0:
            low, high = (b - root) / a, (b + root) / a
        else:
            low, high = ((b - root) / a if a < 0 and c > 0 else 0.0), math.inf
        return max(low, 0.0), high if self.squared_norm > 0 else math.inf

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name, for any logger."""
        low, high = self.interval
        return {
            "noise_scale": self.scale,
            "noise_scale_error": self.error,
            "noise_scale_low": low,
            "noise_scale_high": high,
            "noise_trace": self.trace,
            "gradient_squared_norm": self.squared_norm,
            "noise_windows": self.windows,
        }

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes: plain numbers."""
        return {"decay": self.decay, "windows": self.windows, "moments": list(self._moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken.

        Raises:
            ValueError: the state is damaged, or not of a NoiseScale; it names the entry, and nothing was touched.
        """
        if not isinstance(state, Mapping) or set(state) != {"decay", "windows", "moments"}:
            raise _damaged("state", state, "a mapping with decay, windows and moments")
        decay, windows = state["decay"], state["windows"]
        if not (_is_finite(decay) and 0 <= decay < 1):
            raise _damaged("decay", decay, "a number of at least 0 and below 1")
        if isinstance(windows, bool) or not isinstance(windows, numbers.Integral) or windows < 0:
            raise _damaged("windows", windows, "a whole number of at least 0")
        try:
            moments = [math.nan if isinstance(x, bool | str) else float(x) for x in state["moments"]]
        except (TypeError, ValueError, RuntimeError):  # the last where a tensor is no number
            moments = []
        if len(moments) != len(EMPTY) or not all(map(math.isfinite, moments)) or (windows and moments[0] <= 0):
            raise _damaged("moments", state["moments"], f"{len(EMPTY)} finite numbers")
        self.decay, self.windows, self._moments = float(decay), int(windows), tuple(moments)

    def __str__(self) -> str:
        if not self.windows:
            return "not known: no window held two micro-batches or more"
        if math.isnan(self.scale):
            return f"none: the gradient is zero, over {_count(self.windows, 'window')}"
        low, high = self.interval
        if not math.isfinite(self.scale) or not math.isfinite(high):
            return f"above {_short(low)} items, not told from noise yet over {_count(self.windows, 'window')}"
        return f"{_short(self.scale)} ± {_short(self.error)} items over {_count(self.windows, 'window')}"

    def __repr__(self) -> str:
        return f"NoiseScale({self})"

    def _mean(self, k: int) -> float:
        return self._moments[k] / self._moments[0] if self.windows else math.nan

    def _variances(self) -> tuple[float, float, float]:
        """Of the two running means, and their covariance."""
        share = self._moments[1] / self._moments[0] ** 2  # Σ w² of weights that sum to 1: 1 / (effective windows)
        if share >= 1:
            return math.inf, math.inf, 0.0
        trace, squared_norm, *products = (self._mean(k) for k in range(2, 7))
        means = (trace * trace, squared_norm * squared_norm, trace * squared_norm)
        one, two, both = ((p - m) * share / (1 - share) for p, m in zip(products, means, strict=True))
        return max(one, 0.0), max(two, 0.0), both


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _damaged(name: str, value: Any, kind: str) -> ValueError:
    return ValueError(f"A noise scale's {name} must be {kind}. {errors.received(name, value)} The state is damaged.")


def noise_curve(updates: Iterable[Any], decay: float = 0.95) -> list[dict[str, float]]:
    """The running noise scale over a training, an update a row: for `csv.DictWriter`, a data frame or a logger.

    Args:
        updates: the Updates of a training that measured `noise`; those without are passed over.
        decay: as for `NoiseScale`.

    Returns:
        For each measured update its `update` (index) and `items`, then all of `NoiseScale.as_dict()` up to it.
    """
    running, rows = NoiseScale(decay), []
    for update in updates:
        if update is not None and update.noise is not None:
            running.add(update.noise)
            rows.append({"update": update.index, "items": update.items, **running.as_dict()})
    return rows


@dataclass(frozen=True)
class Advice:
    """Whether a batch is worth it, in words. Nothing acts on it.

    Attributes:
        verdict: "worth it", "past the knee", "wasteful", or "not known".
        text: the advice in plain words, with its numbers and sources.
        ratio: the batch over the noise scale.
        every: how many micro-batches make a batch of the noise scale; None where that is not known.
    """

    verdict: str
    text: str
    ratio: float
    every: int | None

    def __str__(self) -> str:
        return self.text


def advice(noise: NoiseScale, *, batch: float, micro_batch: float, beta2: float | None = None) -> Advice:
    """Says whether a batch is worth its examples, at the noise scale that was measured.

    Args:
        noise: the running noise scale.
        batch: the items of one update.
        micro_batch: the items of one micro-batch.
        beta2: the β₂ of Adam that `batch` was tuned for, for the small-batch alternative.

    A batch B needs (1 + 𝓑/B) times the fewest updates possible and (1 + B/𝓑) times the fewest examples possible, where
    𝓑 is the noise scale (McCandlish et al. 2018). It is a model: the noise scale grows as training goes on, and the
    learning rate must be tuned for the batch.
    """
    batch, micro_batch = errors.check_items(batch), errors.check_items(micro_batch)
    scale, (low, high) = noise.scale, noise.interval
    if not noise.windows or math.isnan(scale):
        return Advice("not known", f"The noise scale is {noise}. Nothing can be advised.", math.nan, None)
    if not math.isfinite(high) or high > 10 * max(low, micro_batch):
        text = f"The noise scale is not known well enough yet: between {_short(low)} and {_short(high)} items (95 %) "
        text += f"after {_count(noise.windows, 'window')}. Ask again later."
        if low > batch:
            text = (
                f"It is worth it: your batch of {_short(batch)} is below the noise scale, which is above {_short(low)} "
                f"items (95 %, {_count(noise.windows, 'window')}). A larger one would still take fewer updates for "
                f"about as many examples (McCandlish et al. 2018)."
            )
        return Advice("worth it" if low > batch else "not known", text, batch / scale, None)

    ratio = batch / scale if scale else math.inf
    every = max(1, math.ceil(scale / micro_batch))
    known = f"the noise scale ({_short(scale)} ± {_short(noise.error)} items)"
    if ratio <= 1:
        updates = _ratio(1 + scale / micro_batch, 1 + scale / batch)
        examples = _ratio(1 + batch / scale, 1 + micro_batch / scale)
        text = (
            f"It is worth it: your batch of {_short(batch)} is {ratio:.2g} × {known}. Beside micro-batches of "
            f"{_short(micro_batch)} alone it takes {updates} × fewer updates to the same loss, for {examples} × the "
            f"examples. It stays worth it up to about every={every} (McCandlish et al. 2018)."
        )
        return Advice("worth it", text, ratio, every)
    enough = every * micro_batch
    examples = (1 + enough / scale) / (1 + batch / scale) if scale else enough / batch
    updates = _ratio(1 + scale / enough, 1 + scale / batch)
    small = f"batch {_short(micro_batch)}"
    if beta2 is not None:
        small += f" with β₂ = {_beta(beta2 ** (micro_batch / batch))} instead of {beta2:g}"
    verdict, opening = ("past the knee", "buys less and less") if ratio <= 4 else ("wasteful", "wastes examples")
    text = (
        f"Your batch of {_short(batch)} is {ratio:.2g} × {known}: it {opening}. With every={every} the same loss takes "
        f"about {examples:.0%} of the examples, in {updates} × as many updates (McCandlish et al. 2018). On one "
        f"device, {small} is the alternative (Marek et al. 2025)."
    )
    return Advice(verdict, text, ratio, every)


@dataclass(frozen=True)
class UntilNoise:
    """A window that closes itself. Made by `until_noise`."""

    eta: float
    at_most: int

    @cached_property
    def looks(self) -> tuple[int, ...]:
        """The counts of micro-batches at which the window is looked at: each about a quarter more than the last."""
        counts = itertools.accumulate(itertools.repeat(0), lambda n, _: n + max(1, n // 4), initial=2)
        return (*itertools.takewhile(lambda n: n < self.at_most, counts), self.at_most)

    def is_enough(self, items: Any, trace: Any, squared_norm: Any) -> Any:
        """Whether tr Σ̂ / B ≤ η²·‖∇L‖²̂, for numbers and for tensors; never of NaN."""
        return trace <= self.eta**2 * squared_norm * items

    def __repr__(self) -> str:
        return f"until_noise(eta={self.eta:g}, at_most={self.at_most})"


def until_noise(*, eta: float = 1.0, at_most: int) -> UntilNoise:
    """Closes the window once its mean gradient is known well enough, as in `every=bb.until_noise(at_most=256)`.

    The norm test: the standard error of the mean gradient, √(tr Σ̂ / B), is at most η times the true gradient's norm.
    A window then holds about 𝓑/η² items, 𝓑 being the noise scale. It is looked at after 2, 3, 4, 5, 6, 7, 8, 10, 12,
    15, … micro-batches, and each look costs the norm of the sum.

    Args:
        eta: the standard error that is good enough, as a fraction of the gradient's norm. 1 makes batches of about the
            noise scale; 0.5, of four times that.
        at_most: the micro-batches after which the window closes in any case.

    Raises:
        TypeError, ValueError: `eta` is not a finite number above zero, or `at_most` not an integer of at least 2.
    """
    if isinstance(eta, bool) or not isinstance(eta, numbers.Real):
        raise TypeError(f"eta must be a number. {errors.received('eta', eta)}")
    if not (math.isfinite(eta) and eta > 0):
        fix = "Pass the standard error that is good enough, as a fraction of the gradient's norm."
        raise ValueError(f"eta must be positive and finite. {errors.received('eta', eta)} {fix}")
    if errors.check_at_most(at_most) < 2:
        raise ValueError(
            f"at_most must be at least 2, for one micro-batch shows no noise. {errors.received('at_most', at_most)}"
        )
    return UntilNoise(float(eta), int(at_most))


def one_in(noise: Any, every: Any = None) -> int:
    """Accepts what `noise=` may be, as one window in so many: True is 20, and 0 stands for none.

    Where the windows close themselves, `every` is an `UntilNoise`, which measures each.
    """
    if isinstance(every, UntilNoise):
        if noise is not False and (noise is True or one_in(noise) != 1):
            raise ValueError(
                f"noise has no effect with every={every}, which measures every window. "
                f"{errors.received('noise', noise)} Leave it out."
            )
        return 1
    if isinstance(noise, bool):
        return 20 if noise else 0
    if isinstance(noise, int) and noise >= 1:
        return noise
    raise ValueError(
        f"noise must be True, False or an integer of at least 1. {errors.received('noise', noise)} "
        "Pass True to measure one window in twenty, or n to measure one in n."
    )


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("s" if n != 1 else "")


def _short(value: float) -> str:
    """A number for a sentence: what is whole as it is, else two or three digits that count."""
    if not math.isfinite(value):
        return "∞"
    if value == int(value) or 10 <= value < 1000:
        return f"{value:,.0f}"
    if value < 10:
        return f"{value:.2g}"
    digits = 10 ** (math.floor(math.log10(value)) - 2)
    return f"{round(value / digits) * digits:,}"


def _beta(value: float) -> str:
    """As many nines as it has, and two digits more."""
    return f"{value:.{1 - math.floor(math.log10(1 - value))}f}".rstrip("0") if 0 < value < 1 else f"{value:g}"


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2g}"
