"""What one call of the stream API came to."""

from typing import NamedTuple

import tensorflow as tf

from bigbatch import skipped
from bigbatch.tensorflow.noise import WindowNoise

OPEN, MADE, NOT_FINITE, EMPTY, CARRIED, DROPPED, NOT_ITEMS, MOVED = range(8)

CUT_SHORT = (
    "The last call of apply_gradients or flush did not end: an error elsewhere in the same step cut it short, so its "
    "micro-batch may be half in the window. The window is dropped; feed its micro-batches again. If that call was to "
    "make the update, the weights may be half updated too: restore the last checkpoint."
)


class Update(NamedTuple):
    """What one call came to. Scalar tensors, so that a `tf.function` can return it, with `jit_compile` too.

    Attributes:
        index: the update's index, from 0; a skipped window leaves it for the next.
        micro_batches: how many micro-batches the window holds.
        items: the examples or tokens that they count for.
        loss: the window's mean loss over items; NaN unless every micro-batch gave its `loss`.
        grad_norm: the 2-norm of the window's mean gradient before clipping, NaN inside a window. Also NaN on several
            replicas whose optimizer does not clip: then only the optimizer sees the gradient of all of them.
        outcome: 0 where the window is still open, 1 where the update was made; above that none was, see `skipped`.
        noise: what the window says of the gradient's noise, NaN where that was not measured; None without `noise`.
    """

    index: tf.Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  # int64
    micro_batches: tf.Tensor  # int64
    items: tf.Tensor  # float64
    loss: tf.Tensor  # float64
    grad_norm: tf.Tensor  # float64
    outcome: tf.Tensor  # int32
    noise: WindowNoise | None

    @property
    def closed(self) -> tf.Tensor:
        """Whether this call ended a window."""
        return tf.not_equal(self.outcome, OPEN)

    @property
    def made(self) -> tf.Tensor:
        """Whether this call made an update."""
        return tf.equal(self.outcome, MADE)

    @property
    def skipped(self) -> str | None:
        """Why no update was made; None where it was, or the window is open. Reading it waits for the device."""
        held = skipped.micro_batches(int(self.micro_batches))
        return {
            NOT_FINITE: skipped.not_finite(float(self.loss), float(self.grad_norm)),
            EMPTY: skipped.NO_GRADIENT,
            NOT_ITEMS: f"{skipped.BAD_ITEMS}, or zero",
            MOVED: "the optimizer made another step inside the window: another apply_gradients or Accumulator",
            CARRIED: skipped.CARRIED.format(held=held),
            DROPPED: skipped.DROPPED.format(held=held),
        }.get(int(self.outcome))
