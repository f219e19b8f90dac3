"""What one window came to: the `Update`, and why a window makes none."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bigbatch import skipped
from bigbatch.noise import Noise
from bigbatch.torch.window import WindowTotals


@dataclass(frozen=True, slots=True)
class Update:
    """What one window came to. Plain numbers, so that a logger can take `dataclasses.asdict(update)`.

    Attributes:
        index: the update's index, from 0; a skipped window leaves it for the next.
        micro_batches: how many micro-batches the window held.
        items: the examples or tokens that they counted for.
        loss: the window's mean loss over items.
        grad_norm: the 2-norm of the window's mean gradient, before clipping.
        skipped: why no update was made, or None where it was.
        noise: an estimate of the gradient's noise, where it was measured.
    """

    index: int
    micro_batches: int
    items: float
    loss: float
    grad_norm: float
    skipped: str | None = None
    noise: Noise | None = None


def unfinished(index: int, totals: WindowTotals, partial: str) -> Update:
    """For a window that is not full, carried or dropped."""
    reason = skipped.CARRIED if partial == "carry" else skipped.DROPPED
    text = reason.format(held=skipped.micro_batches(totals.micro_batches))
    return Update(index, totals.micro_batches, totals.items, totals.loss, math.nan, text)


def why_skipped(update: Update, gradients: Sequence[Tensor], nonfinite: str) -> str | None:
    """Why a window makes no update, or None where it makes one.

    Raises:
        FloatingPointError: it is not finite, and `nonfinite` is "raise".
    """
    reason = None
    if not math.isfinite(update.items):
        reason = skipped.BAD_ITEMS
    elif update.items == 0:
        return skipped.NO_ITEMS
    elif not gradients:
        return skipped.NO_GRADIENT
    elif nonfinite != "apply" and not (math.isfinite(update.loss) and math.isfinite(update.grad_norm)):
        reason = skipped.not_finite(update.loss, update.grad_norm)
    if reason is not None and nonfinite == "raise":
        raise FloatingPointError(f"{reason}. The parameters and the optimizer are as they were.")
    return reason
