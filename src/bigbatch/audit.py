"""Is accumulation exact for this model and this loss? The experiments that answer, and the answer.

A room brings a `Bench`: its gradients of any rows of the batch, with chance seeded and everything put back after each
run. What is here decides which runs to make and what they mean. Causes are found by experiment; no class is looked up
by its name.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

Rows = Sequence[int]
# What two gradients may differ by and still be the same, as a fraction of their norm: rounding, with room to spare.
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
COARSE = 5e-2  # for narrower dtypes


class Run(NamedTuple):
    """One forward pass: the mean loss and the items that it is said to be the mean of."""

    loss: float
    items: float


class Bench(Protocol):
    """What a room brings: a batch, a loss function, and runs that leave nothing behind."""

    length: int  # of the batch
    micro_batch: int
    dtype: str  # that the runs are made in

    def gradient(
        self, parts: Sequence[Rows], *, seed: int, quiet: frozenset[str], fresh: bool = False, items: Any = None
    ) -> Any:
        """Σ nᵢ·gᵢ / Σ nᵢ over parts, each a micro-batch of these rows of the batch.

        Args:
            parts: the rows of each micro-batch.
            seed: for all that draws by chance, once before the first part.
            quiet: the modules that are put in evaluation mode.
            fresh: whether the model's state is put back before each part and not only before the first.
            items: nᵢ to use in place of what the loss function says.
        """
        ...

    def loss(self, rows: Rows, *, seed: int, quiet: frozenset[str]) -> Run:
        """One forward pass over these rows."""
        ...

    def compare(self, full: Any, other: Any) -> list["Compared"]:
        """Two gradients, parameter by parameter."""
        ...

    def sources(self, rows: Rows, seed: int, quiet: frozenset[str]) -> list[str]:
        """The modules where a run over the batch's first rows, with this seed, first leaves the whole batch's (seed 0).

        Those whose inputs agree on these rows and whose outputs do not. Empty where modules cannot be watched.
        """
        ...


@dataclass(frozen=True)
class Compared:
    """One parameter's gradient by the full batch and accumulated.

    Attributes:
        name: the parameter's.
        full: the 2-norm of the full batch's gradient.
        accumulated: the 2-norm of the accumulated one.
        difference: the 2-norm of their difference.
    """

    name: str
    full: float
    accumulated: float
    difference: float

    @property
    def ratio(self) -> float:
        """Of the norms, accumulated / full; NaN where the full batch's is zero."""
        return self.accumulated / self.full if self.full else math.nan

    @property
    def error(self) -> float:
        """The difference relative to the full batch's gradient."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.full if self.full else math.inf

    @property
    def angle(self) -> float:
        """Between the two, in degrees; NaN where one is zero."""
        if not (self.full > 0 and self.accumulated > 0):
            return math.nan
        # |a − f|² = (|a| − |f|)² + 4|a||f| sin²(θ/2): exact for small angles, where a cosine is not.
        squares = max(self.difference**2 - (self.accumulated - self.full) ** 2, 0.0)
        return math.degrees(2 * math.asin(min(1.0, math.sqrt(squares / (self.full * self.accumulated)) / 2)))


@dataclass(frozen=True)
class Cause:
    """Why accumulation is not exact, as far as experiments tell.

    Attributes:
        kind: "chance", "module", "sum", "items", "terms", "coupling", "order", "state", "not finite",
            "not deterministic" or "unknown".
        where: the modules, where it lies in some.
        evidence: what was seen.
        remedy: what to do.
    """

    kind: str
    where: tuple[str, ...]
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.evidence} {self.remedy}"


@dataclass(frozen=True)
class Audit:
    """What an audit found. `str` of it is the report; `table()` and `figure(path)` show it.

    Attributes:
        parameters: every parameter's gradient, full against accumulated.
        causes: why they differ, or why they could.
        length: examples in the batch.
        micro_batch: examples in a micro-batch.
        dtype: what it was computed in.
        chance: whether the model draws by chance, and the comparison was made without.
    """

    parameters: list[Compared]
    causes: list[Cause]
    length: int
    micro_batch: int
    dtype: str
    chance: bool = False

    @property
    def differing(self) -> list[Compared]:
        """The parameters whose gradients differ by more than rounding, the worst first."""
        return sorted(differing(self.parameters, self.dtype), key=lambda p: -_rank(p.error))

    @property
    def exact(self) -> bool:
        """Whether the accumulated gradient is the full batch's; but for chance, where there is some."""
        return not self.differing and not any(cause.kind == "not deterministic" for cause in self.causes)

    @property
    def error(self) -> float:
        """The largest relative error of any parameter."""
        floor = _floor(self.parameters)
        return max((p.difference / max(p.full, floor) if p.difference else 0.0 for p in self.parameters), key=_rank)

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.exact:
            if not self.differing:
                return "not to be told: the loss function is not deterministic"
            worst = self.differing[0].error
            by = f"the largest by {worst:.2g} ×" if worst >= 10 else f"the largest by {_percent(worst)}"
            if not math.isfinite(worst):
                by = "one of them NaN" if math.isnan(worst) else "one of them zero in the full batch"
            return f"not exact: {len(self.differing)} of {_count(len(self.parameters), 'parameter')} differ, {by}"
        exact = f"exact to {self.error:.0e}" if self.error else "exact, bit for bit"
        return f"{exact}, but for chance" if self.chance else exact

    def table(self) -> Any:
        """A `rich` table of the parameters, the worst first."""
        from bigbatch.report import audit_table

        return audit_table(self)

    def figure(self, path: Any) -> None:
        """Saves a figure of the worst parameters, with matplotlib."""
        from bigbatch.report import audit_figure

        audit_figure(self, path)

    def __str__(self) -> str:
        lines = [self.verdict]
        lines += [f"- {cause.kind}{_names(cause.where)}: {cause}" for cause in self.causes]
        if worst := self.differing[:5]:
            width = max(len(p.name) for p in worst)
            lines += [f"  {'parameter':<{width}}  ratio of norms  relative error  angle"]
            lines += [f"  {p.name:<{width}}  {p.ratio:14.4g}  {p.error:14.2e}  {p.angle:4.1f}°" for p in worst]
        lines += [
            f"  (a batch of {self.length} in micro-batches of {self.micro_batch}, {self.dtype}, "
            f"{_count(len(self.parameters), 'parameter')})"
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        causes = "".join(f"; {cause.kind}{_names(cause.where)}" for cause in self.causes)
        return f"<Audit: {self.verdict}{causes}>"


def differing(parameters: list[Compared], dtype: str) -> list[Compared]:
    """Those whose gradients differ by more than rounding. What is nearly zero in both is the same."""
    allowed, floor = TOLERANCE.get(dtype, COARSE), _floor(parameters)
    return [p for p in parameters if not p.difference <= allowed * max(p.full, floor)]


def _floor(parameters: list[Compared]) -> float:
    """Below this a gradient is rounding: the bias in front of a normalization has none."""
    return 1e-3 * max((p.full for p in parameters if math.isfinite(p.full)), default=0.0) or 1e-300


def examine(bench: Bench) -> Audit:
    """Makes the experiments and says what they showed."""
    return _Examination(bench).run()


class _Examination:
    """One audit: the batch, its micro-batches, and what has been put to rest so far."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.all = range(bench.length)
        self.parts = [self.all[i : i + bench.micro_batch] for i in range(0, bench.length, bench.micro_batch)]
        self.quiet: frozenset[str] = frozenset()
        self.causes: list[Cause] = []
        self.allowed = TOLERANCE.get(bench.dtype, COARSE)

    def run(self) -> Audit:
        full = self.full()
        chance = False
        if self.differ(full, self.full()):
            self.causes.append(
                Cause(
                    "not deterministic",
                    (),
                    "The same batch gave two gradients from the same seed: the loss function keeps something from "
                    "call to call, or draws from a generator of its own.",
                    "Make it a function of the model and the batch, drawing from the framework's own generator.",
                )
            )
            return self.answer(full, self.accumulated(), chance=True)
        if self.differ(full, self.full(seed=1)):
            chance = True
            if not self.silence():
                return self.by_many_draws()
            full = self.full()
        accumulated = self.accumulated()
        if self.differ(full, accumulated):
            self.causes += self.find(accumulated)
        return self.answer(full, accumulated, chance)

    def full(self, seed: int = 0, quiet: frozenset[str] | None = None) -> Any:
        return self.bench.gradient([self.all], seed=seed, quiet=self.quiet if quiet is None else quiet)

    def accumulated(self, seed: int = 0, quiet: frozenset[str] | None = None, **how: Any) -> Any:
        return self.bench.gradient(self.parts, seed=seed, quiet=self.quiet if quiet is None else quiet, **how)

    def differ(self, one: Any, other: Any) -> bool:
        return bool(differing(self.bench.compare(one, other), self.bench.dtype))

    def answer(self, full: Any, accumulated: Any, chance: bool) -> Audit:
        compared = self.bench.compare(full, accumulated)
        return Audit(compared, self.causes, self.bench.length, self.bench.micro_batch, self.bench.dtype, chance)

    # Chance.

    def silence(self) -> bool:
        """Puts the modules that draw by chance to rest; whether that was all chance."""
        noisy = tuple(self.bench.sources(self.all, 1, self.quiet))
        resting = self.quiet | set(noisy)
        silent = not self.differ(self.full(quiet=resting), self.full(seed=1, quiet=resting))
        if silent:
            self.quiet = resting
        where = noisy if silent else ()
        draws = f"{', '.join(where)} draw" if len(where) > 1 else f"{where[0]} draws" if where else "The loss draws"
        evidence = f"{draws} by chance: another seed, another gradient."
        remedy = (
            "Each micro-batch draws its own, as the examples of the batch do: exact on average. Compared here in "
            "evaluation mode."
            if silent
            else "Exact on average, if nothing else is wrong. Compared here over many draws."
        )
        self.causes.append(Cause("chance", where, evidence, remedy))
        return silent

    def by_many_draws(self) -> Audit:
        """Chance that cannot be put to rest: are the means over many draws further apart than chance makes them?"""
        draws = 24
        whole, parts = ([one(seed=k) for k in range(draws)] for one in (self.full, self.accumulated))
        means = _mean(whole), _mean(parts)
        found = self.bench.compare(*means)
        squares = sum(
            p.difference**2
            for several, mean in ((whole, means[0]), (parts, means[1]))
            for one in several
            for p in self.bench.compare(mean, one)
        )
        # Twice the standard error of the difference of the two means is what chance may well make.
        if sum(p.difference**2 for p in found) > 4 * squares / (draws * (draws - 1)):
            evidence = f"The means over {draws} draws are further apart than chance makes them."
            self.causes.append(Cause("unknown", (), evidence, "Take chance out of the loss and audit again."))
        else:
            found = [Compared(p.name, p.full, p.accumulated, 0.0) for p in found]
        return Audit(found, self.causes, self.bench.length, self.bench.micro_batch, self.bench.dtype, True)

    # What is left when chance is at rest.

    def find(self, accumulated: Any) -> list[Cause]:
        if bad := [k for k, rows in enumerate(self.parts) if not math.isfinite(self.loss(rows).loss)]:
            listed = ", ".join(map(str, bad))
            return [
                Cause(
                    "not finite",
                    (),
                    f"The loss of micro-batch {listed} is not finite, though the batch's is.",
                    "A mean over nothing is 0/0: return (loss, items), with the number of tokens or examples that are "
                    "not masked; 0 of them then count for nothing.",
                )
            ]
        if self.differ(accumulated, self.accumulated(fresh=True)):
            return [
                Cause(
                    "state",
                    (),
                    "A micro-batch's gradient depends on those before it: the model keeps something from one forward "
                    "to the next.",
                    "Pass what is kept in with the batch, or reset it in each forward.",
                )
            ]
        causes = []
        if modules := self.bench.sources(self.parts[0], 0, self.quiet):
            causes.append(self.blame(modules))
            resting = self.quiet | set(modules)
            if not self.differ(self.full(quiet=resting), self.accumulated(quiet=resting)):
                return causes
            if self.bench.sources(self.parts[0], 0, resting):
                return causes  # they couple the examples in either mode, and hide what the loss may do
            self.quiet = resting
        return [*causes, self.blame_loss()]

    def blame(self, modules: Sequence[str]) -> Cause:
        resting = self.quiet | set(modules)
        cured = not self.bench.sources(self.parts[0], 0, resting)
        listed = ", ".join(modules)
        evidence = (
            f"An example's output of {listed} depends on the other examples that it is computed with: statistics are "
            "taken over the micro-batch, not over the batch."
        )
        remedy = "Normalize within the example (GroupNorm, LayerNorm)" + (
            ", or keep it in evaluation mode, which was seen to help." if cured else "."
        )
        return Cause("module", tuple(modules), evidence, remedy)

    def loss(self, rows: Rows) -> Run:
        return self.bench.loss(rows, seed=0, quiet=self.quiet)

    def blame_loss(self) -> Cause:
        """What the loss is, if it is not the mean over the items it is said to be the mean of."""
        forwards, backwards = self.loss(self.all).loss, self.loss(self.all[::-1]).loss
        if abs(forwards - backwards) > self.allowed * max(abs(forwards), abs(backwards)):
            return Cause(
                "order",
                (),
                f"The loss depends on where in the batch an example stands: {forwards:.6g}, and {backwards:.6g} with "
                "the examples in reverse.",
                "A micro-batch has other places than the batch; let the loss look at examples, not at places.",
            )
        for first, second in _pairs(self.parts):
            probe = Probe.of(self.loss, first, second, self.allowed)
            if probe is not None and (kind := probe.kind()) is not None:
                return self.explain(kind, probe)
        return Cause(
            "unknown",
            (),
            "The gradients differ, and no experiment told why.",
            "Try a batch of more, and more different, examples.",
        )

    def explain(self, kind: str, probe: "Probe") -> Cause:
        if kind == "sum":
            twice = probe.at(2, 2).loss / probe.at(1, 1).loss
            return Cause(
                "sum",
                (),
                f"The loss, or a part of it, is a sum and not a mean: examples seen twice give {twice:.3g} × the loss. "
                'So it is with reduction="sum", and with a division by a constant.',
                "Divide by the number of items that the micro-batch holds.",
            )
        if kind == "terms":
            return Cause(
                "terms",
                (),
                "The loss has parts that are means over different things, such as tokens and examples: no one count of "
                "items weighs both right.",
                "Make every part a mean over the same items, or accumulate each part by itself.",
            )
        if kind == "coupling":
            return Cause(
                "coupling",
                (),
                "The loss couples examples: what one adds depends on which others are there, as in contrastive, "
                "ranking and load-balancing losses.",
                "No accumulation of gradients can be exact. Compute the loss over the whole batch from cached outputs "
                "(GradCache), or accept the micro-batch's loss as another loss.",
            )
        evidence = "The loss is a mean, but not over the items that it is said to be the mean of"
        evidence += f": an example counts {probe.weight:.3g} × as much as another." if probe.weight else "."
        remedy = "Return (loss, items), with the number of tokens or examples, unmasked, that the mean is over."
        weights = self.implied_items()
        if weights is not None and not self.differ(self.full(), self.accumulated(items=weights)):
            shown = ", ".join(f"{w:.3g}" for w in weights[:6]) + (", …" if len(weights) > 6 else "")
            remedy += f" With {shown} (relative to the first) for the micro-batches it is exact, as was seen."
        return Cause("items", (), evidence, remedy)

    def implied_items(self) -> list[float] | None:
        """What each micro-batch counts for, relative to the first, read off the loss of two of them together."""
        first, weights = self.parts[0], [1.0]
        one = self.loss(first).loss
        for rows in self.parts[1:]:
            other, both = self.loss(rows).loss, self.loss([*first, *rows]).loss
            if other == one or both == other:
                return None
            weight = (one - both) / (both - other)
            if not (math.isfinite(weight) and weight > 0):
                return None
            weights.append(weight)
        return weights


class Probe:
    """What kind of mean a loss is, told from two blocks of examples, each repeated a and b times.

    Repeating changes no example and no token, only counts, so that every kind of loss leaves its own trace:

    * a mean over d (examples, tokens):  L(a, b) = u + v·ρ,  ρ = a·d₁ / (a·d₁ + b·d₂), of degree 1 in ρ
    * a sum:                             L(a, b) = a·u + b·v
    * means over two things:             u + v·ρ + v′·ρ′
    * anything else couples the examples.

    What a mean is over need not be known: d₁/d₂ follows from L(1, 1). Ten points are more than any of these has
    unknowns, so that a fit is a finding.
    """

    POINTS = ((1, 0), (0, 1), (1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (4, 1), (2, 3))

    def __init__(self, losses: dict[tuple[int, int], Run], sizes: tuple[int, int], allowed: float):
        self.losses, self.allowed = losses, allowed
        self.examples = sizes[0] / sizes[1]
        items = losses[1, 0].items, losses[0, 1].items
        self.items = items[0] / items[1]
        self.values = [losses[p].loss for p in self.POINTS]
        self.weight: float | None = None

    @classmethod
    def of(cls, loss: Any, first: Rows, second: Rows, allowed: float) -> "Probe | None":
        """From a loss of rows; None where it is not finite on these blocks, or the same on both."""
        losses = {(a, b): loss([*first] * a + [*second] * b) for a, b in cls.POINTS}
        values = [run.loss for run in losses.values()]
        if not all(map(math.isfinite, values)) or min(losses[1, 0].items, losses[0, 1].items) <= 0:
            return None
        if max(values) - min(values) <= 100 * allowed * max(map(abs, values)):
            return None
        return cls(losses, (len(first), len(second)), allowed)

    def at(self, a: int, b: int) -> Run:
        """The first block a times and the second b times."""
        return self.losses[a, b]

    def kind(self) -> str | None:
        """What the trace is of; None where it is what the items say."""
        n, c = self.share(self.examples), self.share(self.items)
        sums = [[float(a) for a, _ in self.POINTS], [float(b) for _, b in self.POINTS]]
        if self.fits(c):
            return None
        if self.fits(n):
            return "items"
        if self.fits(*sums, constant=False) or self.fits(n, *sums) or self.fits(c, *sums):
            return "sum"
        own = self.own_weight()
        if own is not None and self.fits(self.share(own)):
            self.weight = own / self.examples
            return "items"
        # A product of means, where examples meet. Before two means, which come as near to a square as one likes.
        if any(self.fits(share, [x * x for x in share]) for share in (n, c)):
            return "coupling"
        if self.fits(n, c) or any(self.fits_with_another(known) for known in {self.examples, self.items}):
            return "terms"
        return "coupling"

    def share(self, weight: float) -> list[float]:
        """ρ at every point, for a block that counts `weight` times the other."""
        return [a * weight / (a * weight + b) for a, b in self.POINTS]

    def own_weight(self) -> float | None:
        """d₁/d₂, if the loss is a mean over some d."""
        one, two, both = (self.losses[p].loss for p in ((1, 0), (0, 1), (1, 1)))
        if both in (one, two):
            return None
        weight = (both - two) / (one - both)
        return weight if 1e-4 < weight < 1e4 else None

    def fits(self, *columns: list[float], constant: bool = True) -> bool:
        """Whether the losses are a linear combination of these."""
        return self.residual(*columns, constant=constant) <= self.allowed

    def residual(self, *columns: list[float], constant: bool = True) -> float:
        """What a linear combination leaves, relative to the losses: Gram and Schmidt, twice for good measure."""
        basis: list[list[float]] = []
        rest = list(self.values)
        for column in [*([[1.0] * len(rest)] if constant else []), *columns]:
            size = _norm(column)
            for _ in range(2):
                for done in basis:
                    column = _without(column, done)
            left = _norm(column)
            if left > 1e-9 * size:
                basis.append([x / left for x in column])
        for _ in range(2):
            for done in basis:
                rest = _without(rest, done)
        return _norm(rest) / _norm(self.values)

    def fits_with_another(self, known: float) -> bool:
        """Whether it is a mean over what is known and one over something else."""
        if self.allowed > 1e-6:
            return False  # so many unknowns fit anything to such a precision
        grid = [10 ** (k / 40 - 2.5) for k in range(201)]

        def left(log_weight: float) -> float:
            return self.residual(self.share(known), self.share(math.exp(log_weight)))

        best = math.log(min((w for w in grid if abs(w / known - 1) > 0.02), key=lambda w: left(math.log(w))))
        low, high = best - 0.06, best + 0.06
        for _ in range(60):  # golden section
            third, two_thirds = low + 0.381966 * (high - low), low + 0.618034 * (high - low)
            low, high = (low, two_thirds) if left(third) < left(two_thirds) else (third, high)
        weight = (low + high) / 2
        return left(weight) <= self.allowed and abs(math.exp(weight) / known - 1) > 1e-3


def _pairs(parts: Sequence[Rows]) -> list[tuple[Rows, Rows]]:
    """Pairs of blocks to probe: different examples, of different sizes where there are enough."""
    rows = [row for part in parts for row in part]
    size = max(1, min(len(parts[0]), len(rows) // 3))
    draw, pairs = random.Random(0), []
    for _ in range(6):
        mixed = draw.sample(rows, len(rows))
        pairs.append((mixed[:size], mixed[size : size + max(1, size - 1)]))
    return [(one, two) for one, two in pairs if two]


def _mean(gradients: list[Any]) -> Any:
    """Of gradients as a room gives them: mappings from names to arrays."""
    return {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in values))


def _without(values: Sequence[float], unit: Sequence[float]) -> list[float]:
    along = math.fsum(x * y for x, y in zip(values, unit, strict=True))
    return [x - along * y for x, y in zip(values, unit, strict=True)]


def _rank(error: float) -> float:
    """NaN is worse than anything."""
    return math.inf if math.isnan(error) else error


def _percent(error: float) -> str:
    return f"{error:.0%}" if error >= 0.1 else f"{error:.1%}" if error >= 1e-3 else f"{error:.1e}"


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("s" if n != 1 else "")


def _names(where: Sequence[str]) -> str:
    return f" ({', '.join(where)})" if where else ""
