"""The law: one window, one gradient.

Micro-batch i has a mean loss over nᵢ items, and that loss has the gradient gᵢ. The big batch's own gradient is

    g = Σ nᵢ·gᵢ / Σ nᵢ

Plain operators only, so the same lines run on `fractions.Fraction`, on NumPy and on tensors. Every framework's
loop is tested against them, and none calls them: they keep all N gradients alive at once.
"""

from collections.abc import Iterable
from typing import Any


def mean(values: Iterable[Any], items: Iterable[Any]) -> Any:
    """Σ nᵢ·vᵢ / Σ nᵢ, for gradients and for losses alike.

    Args:
        values: one value a micro-batch, each the mean over that micro-batch's items: numbers or arrays of one shape.
        items: how many items each micro-batch counts for, in the same order.

    Returns:
        The mean over all items, of the type that `+`, `*` and `/` give.

    Raises:
        ValueError: there are not as many values as items.
        ZeroDivisionError: there are no micro-batches.
    """
    pairs = list(zip(values, items, strict=True))
    return sum(n * v for v, n in pairs) / sum(n for _, n in pairs)
