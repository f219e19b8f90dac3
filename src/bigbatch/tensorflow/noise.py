"""The norm of every micro-batch's gradient, for the noise scale (see `bigbatch.noise`), in variables."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.engines.tensorflow_sparse import Gradient, merged
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.noise import EMPTY, NoiseScale, UntilNoise, averaged, estimate, one_in
from bigbatch.tensorflow.checks import COUNT

DECAY = NoiseScale().decay


class WindowNoise(NamedTuple):
    """The noise in one window's gradient; NaN where it was not measured. Scalar tensors."""

    micro_batches: tf.Tensor  # that were measured, int64
    items: tf.Tensor  # float64
    trace: tf.Tensor  # the variance of one item's gradient, summed over all variables, float64
    squared_norm: tf.Tensor  # the true gradient's; noise may make it negative, float64


def nothing() -> WindowNoise:
    """For a window that was not measured, or is still open."""
    nan = tf.constant(math.nan, COUNT)
    return WindowNoise(tf.zeros((), tf.int64), tf.zeros((), COUNT), nan, nan)


class Meter(tf.Module):
    """Σ bᵢ‖gᵢ‖² of the open window, and the running moments."""

    def __init__(self, windows: int):
        super().__init__()
        self.one_in = windows  # one window in so many is measured
        self.squares = tf.Variable(tf.zeros((), COUNT), trainable=False)
        self.windows = tf.Variable(tf.zeros((), tf.int64), trainable=False)
        self.moments = tf.Variable(tf.constant(EMPTY, COUNT), trainable=False)

    @classmethod
    def where_asked(cls, every: Any, noise: bool | int) -> "Meter | None":
        """One for an Accumulator with these options, or None."""
        windows = one_in(noise, every)
        if windows and tf.distribute.has_strategy():
            raise ValueError(
                "The noise scale is not measured under a tf.distribute strategy: only the optimizer sees the gradient "
                "of all replicas. Leave noise and until_noise out, or measure on one device."
            )
        return cls(windows) if windows else None

    def measures(self, index: tf.Tensor) -> tf.Tensor:
        """Whether the window of this update is measured."""
        return tf.equal(tf.math.floormod(index, self.one_in), 0)

    def take(self, gradients: Iterable[Gradient], items: tf.Tensor, first: tf.Tensor, index: tf.Tensor) -> Any:
        """Takes in one micro-batch's gradient. Returns the operation that does."""
        gradients = list(gradients)

        def more() -> tf.Tensor:
            return items * tf.add_n([_square(g) for g in gradients]) if gradients else tf.zeros((), COUNT)

        square = more() if self.one_in == 1 else tf.cond(self.measures(index), more, lambda: tf.zeros((), COUNT))
        return self.squares.assign(tf.where(first, tf.zeros((), COUNT), self.squares) + square, read_value=False)

    def window(self, micro_batches: tf.Tensor, items: tf.Tensor, norm: tf.Tensor, scale: tf.Tensor) -> WindowNoise:
        """The estimates so far; the gradients and the norm of their mean were scaled by `scale`."""
        count = tf.cast(micro_batches, COUNT)
        trace, squared_norm = estimate(count, items, self.squares / scale**2, (norm / scale) ** 2)
        some = micro_batches > 1
        return WindowNoise(
            micro_batches, items, tf.where(some, trace, math.nan), tf.where(some, squared_norm, math.nan)
        )

    def close(self, now: WindowNoise, index: tf.Tensor, made: tf.Tensor) -> WindowNoise:
        """After a window: a skipped one is left out of the running moments."""
        measures = self.measures(index)
        good = measures & made & tf.math.is_finite(now.trace) & tf.math.is_finite(now.squared_norm)
        moments = averaged(tf.unstack(self.moments), now.trace, now.squared_norm, DECAY)
        self.moments.assign(tf.where(good, tf.stack(moments), self.moments))
        self.windows.assign_add(tf.cast(good, tf.int64))
        return WindowNoise(*(tf.where(measures, new, old) for new, old in zip(now, nothing(), strict=True)))

    def scale(self) -> NoiseScale:
        """The running noise scale. The host waits for the device."""
        running = NoiseScale(DECAY)
        moments = [float(x) for x in self.moments.numpy()]
        running.load_state_dict({"decay": DECAY, "windows": int(self.windows), "moments": moments})
        return running


def looked_at(every: UntilNoise, micro_batches: tf.Tensor) -> tf.Tensor:
    """Whether `every` checks an open window of so many micro-batches."""
    return tf.reduce_any(tf.equal(micro_batches, tf.constant(every.looks[:-1], tf.int64)))


def _square(gradient: Gradient) -> tf.Tensor:
    if isinstance(gradient, tf.IndexedSlices):
        # The same row may be named several times.
        gradient = tf.convert_to_tensor(gradient) if under_xla() else merged(gradient.indices, gradient.values).values
    wide = tf.cast(gradient, tf.float32) if gradient.dtype.size < tf.float32.size else gradient
    return tf.cast(tf.reduce_sum(tf.square(wide)), COUNT)
