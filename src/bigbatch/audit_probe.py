"""What kind of mean a loss is, found by repeating examples (see `bigbatch.audit_experiments`)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

Examples = Sequence[int]


class Run(NamedTuple):
    """One forward pass: the mean loss and the items that it is said to be the mean of."""

    loss: float
    items: float


class Probe:
    """What kind of mean a loss is, found from two blocks of examples, each repeated a and b times.

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
    def of(cls, loss: Any, first: Examples, second: Examples, allowed: float) -> "Probe | None":
        """From a loss of examples; None where it is not finite on these blocks, or the same on both."""
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


def _norm(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in values))


def _without(values: Sequence[float], unit: Sequence[float]) -> list[float]:
    along = math.fsum(x * y for x, y in zip(values, unit, strict=True))
    return [x - along * y for x, y in zip(values, unit, strict=True)]
