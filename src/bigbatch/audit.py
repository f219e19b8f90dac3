"""Is accumulation exact for this model and this loss? The result of an audit; `bigbatch.audit_experiments` makes it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigbatch import report

# What two gradients may differ by and still be the same, as a fraction of their norm: rounding, with a margin.
FINE, LOOSE, COARSE = 1e-9, 1e-4, 5e-2  # of float64, of float32, of narrower dtypes


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
    """Why accumulation is not exact, as far as experiments show.

    Attributes:
        kind: "stochastic", "module", "sum", "items", "terms", "coupling", "order", "state", "not finite",
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
        tolerance: the relative error that is rounding.
        stochastic: whether the model draws random numbers; the comparison was made without them.
    """

    parameters: list[Compared]
    causes: list[Cause]
    length: int
    micro_batch: int
    dtype: str
    tolerance: float
    stochastic: bool = False

    @property
    def differing(self) -> list[Compared]:
        """The parameters whose gradients differ by more than rounding, the worst first."""
        return sorted(differing(self.parameters, self.tolerance), key=lambda p: -rank(p.error))

    @property
    def exact(self) -> bool:
        """Whether the accumulated gradient is the full batch's, apart from random draws where there are some."""
        return not self.differing and not any(cause.kind == "not deterministic" for cause in self.causes)

    @property
    def error(self) -> float:
        """The largest relative error of any parameter."""
        floor = floor_of(self.parameters)
        return max((p.difference / max(p.full, floor) if p.difference else 0.0 for p in self.parameters), key=rank)

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.exact:
            if not self.differing:
                return "undecided: the loss function is not deterministic"
            worst = self.differing[0].error
            by = f"the largest by {worst:.2g} ×" if worst >= 10 else f"the largest by {_percent(worst)}"
            if not math.isfinite(worst):
                by = "one of them NaN" if math.isnan(worst) else "one of them zero in the full batch"
            return f"not exact: {len(self.differing)} of {_count(len(self.parameters), 'parameter')} differ, {by}"
        exact = f"exact to {self.error:.0e}" if self.error else "exact, bit for bit"
        return f"{exact}, apart from randomness" if self.stochastic else exact

    def rows(self) -> list[dict[str, Any]]:
        """A row for each parameter, the worst first, for a table or a data frame.

        Its keys are `name`, `full`, `accumulated`, `ratio`, `error` (relative to the full batch's gradient, or to the
        floor below which a gradient is rounding), `angle` in degrees, and `differs`: by more than rounding.
        """
        floor, wrong = floor_of(self.parameters), {p.name for p in self.differing}
        rows = [
            {
                "name": p.name,
                "full": p.full,
                "accumulated": p.accumulated,
                "ratio": p.ratio,
                "error": p.difference / max(p.full, floor) if p.difference else 0.0,
                "angle": p.angle,
                "differs": p.name in wrong,
            }
            for p in self.parameters
        ]
        return sorted(rows, key=lambda row: -rank(row["error"]))

    def table(self, most: int = 20) -> Any:
        """A `rich` table of at most `most` parameters: those that differ, the worst first; else the largest."""
        rows = self.rows()
        chosen = [row for row in rows if row["differs"]] or sorted(rows, key=lambda row: -row["full"])
        return report.audit_table(chosen[:most], self.verdict, len(chosen) - most)

    def figure(self, path: Any, most: int = 12) -> None:
        """Saves a figure of the `most` worst parameters, with matplotlib."""
        title = f"{self.verdict}\n{self.length} examples in micro-batches of {self.micro_batch}"
        report.audit_figure(self.rows()[:most][::-1], self.tolerance, title, path)

    def __str__(self) -> str:
        lines = [self.verdict]
        lines += [f"- {cause.kind}{_names(cause.where)}: {cause}" for cause in self.causes]
        if worst := self.differing[:5]:
            width = max(len(p.name) for p in worst)
            lines += [f"  {'parameter':<{width}}  ratio of norms  relative error  angle"]
            lines += [f"  {p.name:<{width}}  {p.ratio:14.4g}  {p.error:14.2e}  {p.angle:4.1f}°" for p in worst]
        rounding = "" if self.tolerance in (FINE, LOOSE, COARSE) else f" with parts narrower (to {self.tolerance:.0e})"
        lines += [
            f"  (a batch of {self.length} in micro-batches of {self.micro_batch}, {self.dtype}{rounding}, "
            f"{_count(len(self.parameters), 'parameter')})"
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        causes = "".join(f"; {cause.kind}{_names(cause.where)}" for cause in self.causes)
        return f"<Audit: {self.verdict}{causes}>"


def compared(full: Mapping[str, Any], other: Mapping[str, Any]) -> list[Compared]:
    """Two gradients, parameter by parameter: arrays of any framework, by name."""

    def norm(array: Any) -> float:
        return math.sqrt(float((array * array).sum()))

    return [Compared(name, norm(g), norm(other[name]), norm(g - other[name])) for name, g in full.items()]


def differing(parameters: list[Compared], tolerance: float) -> list[Compared]:
    """Those whose gradients differ by more than rounding. What is nearly zero in both is the same."""
    floor = floor_of(parameters)
    return [p for p in parameters if not p.difference <= tolerance * max(p.full, floor)]


def floor_of(parameters: list[Compared]) -> float:
    """Below this a gradient is rounding: the bias in front of a normalization has none."""
    return 1e-3 * max((p.full for p in parameters if math.isfinite(p.full)), default=0.0) or 1e-300


def rank(error: float) -> float:
    """NaN is worse than anything."""
    return math.inf if math.isnan(error) else error


def _percent(error: float) -> str:
    return f"{error:.0%}" if error >= 0.1 else f"{error:.1%}" if error >= 1e-3 else f"{error:.1e}"


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}" + ("s" if n != 1 else "")


def _names(where: Sequence[str]) -> str:
    return f" ({', '.join(where)})" if where else ""
