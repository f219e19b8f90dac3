"""What a window of the split door is made of while it is open: a loss, its items, and gradients in several forms.

They are dense, sparse, or products that wait to be multiplied out (see `bigbatch.fused.tensorflow_deferred`); one
micro-batch's may also be taken apart (see `bigbatch.fused.tensorflow_lookups`).
"""

from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.engines.tensorflow_sparse import Gradient, SparseRows, cast, merged, scaled
from bigbatch.fused.tensorflow_deferred import FactoredGrad, factored_grad
from bigbatch.fused.tensorflow_lookups import SplitGradient, split_gradient
from bigbatch.tensorflow.checks import under_xla

# None where the loss does not depend on the variable, a dense tensor, SparseRows, a FactoredGrad, or SplitGradient.
Part = Any


class Window(NamedTuple):
    """The sums of the micro-batches so far, each weighted with its items / unit (see `bigbatch.law`).

    The unit is the first micro-batch's items: weights are then near 1, so that a half-precision backward pass sees
    gradients of the size that it would see without a window, and a window of one is left as it is.
    """

    loss: tf.Tensor  # shape=()
    items: tf.Tensor  # shape=(), COUNT
    unit: tf.Tensor  # shape=(), COUNT; 0 before the first micro-batch
    gradients: list[Part]


def part_of(gradient: Gradient | None, weight: tf.Tensor | None, dtype: tf.DType, shape: tf.TensorShape) -> Part:
    """One micro-batch's gradient of a variable of that shape, times its weight, as it is kept."""
    if gradient is None:
        return None
    if weight is None and gradient.dtype == dtype:
        found = factored_grad(gradient) or (None if under_xla() else split_gradient(gradient, shape))
        if found is not None:
            return found
    if isinstance(gradient, tf.IndexedSlices) and under_xla():
        gradient = tf.convert_to_tensor(gradient)
    wide = cast(gradient, dtype)
    wide = wide if weight is None else scaled(wide, weight)
    return SparseRows(wide.indices, wide.values) if isinstance(wide, tf.IndexedSlices) else wide


def joined(a: Window, b: Window) -> Window:
    """Two windows in one; the unit is the first one's, which the second was weighted with."""
    gradients = [add(g, h) for g, h in zip(a.gradients, b.gradients, strict=True)]
    return Window(a.loss + b.loss, a.items + b.items, b.unit, gradients)


def add(a: Part, b: Part) -> Part:
    """The sum of two gradients, either of which may be missing."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, SparseRows):
        return SparseRows(*merged(tf.concat([a.indices, b.indices], 0), tf.concat([a.values, b.values], 0)))
    if isinstance(a, FactoredGrad) and isinstance(b, FactoredGrad):
        return FactoredGrad(tf.concat([a.left, b.left], 0), tf.concat([a.right, b.right], 0))
    return b.added_to(multiplied(a)) if isinstance(b, SplitGradient) else multiplied(a) + multiplied(b)


def multiplied(a: Part) -> tf.Tensor:
    """As a dense tensor."""
    return a.to_dense() if isinstance(a, FactoredGrad) else a


def finished(gradient: Part, factor: tf.Tensor, variable: Any) -> Gradient | None:
    """The mean, as GradientTape would have returned it; a sparse one names each row once."""
    if gradient is None:
        return None
    if isinstance(gradient, FactoredGrad):
        return gradient.times(factor)
    if isinstance(gradient, SparseRows):
        rows, values = merged(*gradient)
        gradient = tf.IndexedSlices(values, rows, tf.constant(tuple(variable.shape), rows.dtype))
    return cast(scaled(gradient, factor), tf.as_dtype(variable.dtype))
