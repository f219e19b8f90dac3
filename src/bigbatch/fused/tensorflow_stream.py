"""The stream API's sum of a large matrix's gradients, which stores them as factors.

It is the twin of `DenseSum` in `bigbatch.tensorflow.accumulators`. What it buys, where that was measured and where it
does nothing stand in tensorflow_deferred.py and tensorflow_lookups.py. It also does nothing under XLA, whose variables
cannot grow, and under a `tf.distribute` strategy.
"""

from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import done, of_any_shape
from bigbatch.engines.tensorflow_sparse import Gradient, add_scaled, cast, scaled
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.fused.tensorflow_deferred import FEW, FactoredGrad, factors_of, row_capacity
from bigbatch.fused.tensorflow_lookups import split_gradient


def terms(gradient: Gradient, shape: tf.TensorShape) -> list[Any]:
    """The gradient of a variable of this shape, as the terms to add to its sum one after the other."""
    split = None if under_xla() or not tf.is_tensor(gradient) else split_gradient(gradient, shape)
    return [gradient] if split is None else split.terms


def is_large(shape: tf.TensorShape) -> bool:
    """Whether a variable of this shape has a `DeferredSum`."""
    sides: Any = shape.as_list()
    return len(sides) == 2 and row_capacity(*sides) >= FEW


class DeferredSum(tf.Module):
    """A sum of gradients, of which those that a graph shows as factors are stored as these.

    The factors are flushed, that is added to the total as one matmul, once a window, or earlier where they would take
    more than a quarter of the total's memory.
    """

    saved_as = "ProductSum"  # in checkpoints

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType):
        super().__init__()
        sides: Any = shape.as_list()
        self.total = tf.Variable(tf.zeros(shape, dtype), trainable=False)
        self.left, self.right = (
            tf.Variable(tf.zeros([0, side], dtype), trainable=False, shape=[None, side]) for side in sides
        )
        self._capacity = row_capacity(*sides)

    def clear(self) -> list[Any]:
        """Assigns zeros, and forgets the rows. Returns the operations that do."""
        # XLA cannot change how many rows there are.
        none = [tf.zeros_like(side) if under_xla() else of_any_shape(side[:0]) for side in (self.left, self.right)]
        return [
            self.total.assign(tf.zeros_like(self.total), read_value=False),
            self.left.assign(none[0], read_value=False),
            self.right.assign(none[1], read_value=False),
        ]

    def add(self, gradient: Gradient, weight: tf.Tensor) -> Any:
        """Adds weight · gradient. Returns the operations that do."""
        weight = tf.cast(weight, self.total.dtype)
        factors = None if under_xla() or gradient.dtype != self.total.dtype else factors_of(gradient)
        if factors is None:
            return self._add(cast(gradient, self.total.dtype), weight)

        def at_once() -> tf.Tensor:
            return done(self._add(factors.to_dense(), weight))

        # By how many rows there are, not by whether the graph knows it: the same rows give the same bits.
        known = factors.left.shape[0]
        few = FEW * (tf.shape(factors.left)[0] if known is None else known) <= self._capacity
        if known is None:
            return tf.cond(few, lambda: self._defer(factors, weight), at_once)
        return self._defer(factors, weight) if few else at_once()

    def _add(self, gradient: Gradient, weight: tf.Tensor) -> list[Any]:
        return [add_scaled(self.total, term, weight) for term in terms(gradient, self.total.shape)]

    def _defer(self, factors: FactoredGrad, weight: tf.Tensor) -> tf.Tensor:
        more = FactoredGrad(factors.left, factors.right * weight)
        rows = FactoredGrad(*map(tf.convert_to_tensor, (self.left, self.right))).concat(more)

        def store(left: tf.Tensor = rows.left, right: tf.Tensor = rows.right) -> tf.Tensor:
            return done(
                self.left.assign(of_any_shape(left), read_value=False),
                self.right.assign(of_any_shape(right), read_value=False),
            )

        def flush() -> tf.Tensor:
            added = self.total.assign_add(rows.to_dense(), read_value=False)
            return done(added, store(rows.left[:0], rows.right[:0]))

        return tf.cond(tf.shape(rows.left)[0] <= self._capacity, store, flush)

    def mean(self, factor: tf.Tensor) -> Gradient:
        """The sum times `factor`."""
        mean = scaled(tf.convert_to_tensor(self.total), factor)
        rows = FactoredGrad(*map(tf.convert_to_tensor, (self.left, self.right)))
        return tf.cond(tf.shape(rows.left)[0] > 0, lambda: mean + rows.times(factor), lambda: mean)
