"""Running sums of one variable's gradients, Σ wᵢ·gᵢ, in variables that checkpoints and SavedModels find."""

from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import done, of_any_shape
from bigbatch.engines.tensorflow_sparse import Gradient, SparseRows, cast, merged, scaled
from bigbatch.fused.tensorflow_deferred import FEW, FactoredGrad, factors_of, row_capacity
from bigbatch.fused.tensorflow_lookups import split_gradient
from bigbatch.tensorflow.checks import under_xla

# Each replica of a strategy keeps its own sum, and a checkpoint holds the sum over them.
LOCAL = {
    "trainable": False,
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.SUM,
}


def widened(dtype: Any, narrowest: Any) -> tf.DType:
    """The dtype to accumulate in: a variable's own, or `narrowest` where that is wider."""
    dtype = tf.as_dtype(dtype)
    return dtype if narrowest is None or dtype.size >= tf.as_dtype(narrowest).size else tf.as_dtype(narrowest)


class DenseSum(tf.Module):
    """A sum with the variable's own shape."""

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType):
        super().__init__()
        self.total = tf.Variable(tf.zeros(shape, dtype), **LOCAL)

    def clear(self) -> list[Any]:
        """Assigns zeros, whatever stood there. Returns the operations that do."""
        return [self.total.assign(tf.zeros_like(self.total), read_value=False)]

    def add(self, gradient: Gradient, weight: tf.Tensor) -> Any:
        """Adds weight · gradient. Returns the operations that do, in order."""
        weight = tf.cast(weight, self.total.dtype)
        found = (
            None if under_xla() or gradient.dtype != self.total.dtype else split_gradient(gradient, self.total.shape)
        )
        added: list[Any] = []
        for term in found.terms if found else [cast(gradient, self.total.dtype)]:
            if isinstance(term, SparseRows | tf.IndexedSlices):
                one = tf.raw_ops.ResourceScatterAdd(
                    resource=self.total.handle, indices=term.indices, updates=term.values * weight
                )
            else:
                # var -= alpha·delta: the one op that adds a multiple in a single pass over memory.
                one = tf.raw_ops.ResourceApplyGradientDescent(var=self.total.handle, alpha=-weight, delta=term)
            added.append(one)
        return added

    def mean(self, factor: tf.Tensor) -> Gradient:
        """The sum times `factor`."""
        return scaled(tf.convert_to_tensor(self.total), factor)


class ProductSum(DenseSum):
    """The same for a large matrix: gradients that are products of a few rows wait as these rows.

    They are multiplied out once a window, or more often where they would take more than a quarter of the sum's memory.
    XLA, which knows no growing variables, adds gradients up as they come; rows that it finds it counts.
    """

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType):
        super().__init__(shape, dtype)
        sides: Any = shape.as_list()
        rows, columns = sides
        self.left = tf.Variable(tf.zeros([0, rows], dtype), shape=[None, rows], **LOCAL)
        self.right = tf.Variable(tf.zeros([0, columns], dtype), shape=[None, columns], **LOCAL)
        self._room = row_capacity(rows, columns)

    def clear(self) -> list[Any]:
        """Assigns zeros, and forgets the rows. Returns the operations that do."""
        none = [tf.zeros_like(side) if under_xla() else of_any_shape(side[:0]) for side in (self.left, self.right)]
        return [
            *super().clear(),
            self.left.assign(none[0], read_value=False),
            self.right.assign(none[1], read_value=False),
        ]

    def add(self, gradient: Gradient, weight: tf.Tensor) -> Any:
        """Adds weight · gradient. Returns the operations that do."""
        product = None if under_xla() or gradient.dtype != self.total.dtype else factors_of(gradient)
        if product is None:
            return super().add(gradient, weight)

        def now() -> tf.Tensor:
            return done(super(ProductSum, self).add(product.to_dense(), weight))

        # By what the micro-batch holds, not by whether the graph knows it: the same rows give the same bits.
        known = product.left.shape[0]
        few = FEW * (tf.shape(product.left)[0] if known is None else known) <= self._room
        if known is None:
            return tf.cond(few, lambda: self._wait(product, weight), now)
        return self._wait(product, weight) if few else now()

    def _wait(self, product: FactoredGrad, weight: tf.Tensor) -> tf.Tensor:
        left = tf.concat([self.left, product.left], 0)
        right = tf.concat([self.right, product.right * tf.cast(weight, product.right.dtype)], 0)

        def keep(kept_left: tf.Tensor = left, kept_right: tf.Tensor = right) -> tf.Tensor:
            return done(
                self.left.assign(of_any_shape(kept_left), read_value=False),
                self.right.assign(of_any_shape(kept_right), read_value=False),
            )

        def multiply() -> tf.Tensor:
            added = self.total.assign_add(FactoredGrad(left, right).to_dense(), read_value=False)
            return done(added, keep(left[:0], right[:0]))

        return tf.cond(tf.shape(left)[0] <= self._room, keep, multiply)

    def mean(self, factor: tf.Tensor) -> Gradient:
        """The sum times `factor`."""
        mean: Any = super().mean(factor)
        product = FactoredGrad(tf.identity(self.left), tf.identity(self.right))
        return tf.cond(tf.shape(product.left)[0] > 0, lambda: mean + product.times(factor), lambda: mean)


class SparseSum(tf.Module):
    """A sum of the rows that were touched, each held once."""

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType):
        super().__init__()
        row = shape[1:]
        self.indices = tf.Variable(tf.zeros([0], tf.int64), shape=[None], **LOCAL)
        self.values = tf.Variable(tf.zeros([0, *row], dtype), shape=[None, *row], **LOCAL)
        self._shape: Any = shape

    def clear(self) -> list[Any]:
        """Forgets every row. Returns the operations that do."""
        return self._assign(self.indices[:0], self.values[:0])

    def _assign(self, indices: tf.Tensor, values: tf.Tensor) -> list[Any]:
        return [
            self.indices.assign(of_any_shape(indices), read_value=False),
            self.values.assign(of_any_shape(values), read_value=False),
        ]

    def add(self, gradient: Gradient, weight: tf.Tensor) -> Any:
        """Adds weight · gradient to the rows that it names. Returns the operations that do."""
        gradient = scaled(cast(gradient, self.values.dtype), weight)
        if isinstance(gradient, tf.IndexedSlices):
            rows, values = tf.cast(gradient.indices, tf.int64), gradient.values
        else:
            rows, values = tf.range(self._shape[0], dtype=tf.int64), gradient
        rows, values = merged(tf.concat([self.indices, rows], 0), tf.concat([self.values, values], 0))
        return self._assign(rows, values)

    def mean(self, factor: tf.Tensor) -> Gradient:
        """The sum times `factor`, each row once."""
        values, rows = tf.convert_to_tensor(self.values), tf.convert_to_tensor(self.indices)
        return scaled(tf.IndexedSlices(values, rows, tf.constant(self._shape.as_list(), tf.int64)), factor)


def kind(variable: Any, sparse: bool) -> Any:
    """Which of the three sums a variable's gradients have."""
    shape = variable.shape.as_list()
    large = len(shape) == 2 and row_capacity(*shape) >= FEW
    return SparseSum if sparse else ProductSum if large else DenseSum
