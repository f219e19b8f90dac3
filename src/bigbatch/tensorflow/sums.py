"""Running sums of one variable's gradients, Σ wᵢ·gᵢ, in variables that checkpoints and SavedModels find."""

from typing import Any

import tensorflow as tf

Gradient = tf.Tensor | tf.IndexedSlices

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


def cast(gradient: Gradient, dtype: tf.DType) -> Any:
    """The gradient in another dtype, sparse if it was."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape)
    return tf.cast(gradient, dtype)


def scaled(gradient: Gradient, factor: tf.Tensor) -> Any:
    """The gradient times a scalar of any dtype, sparse if it was."""
    factor = tf.cast(factor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def merged(indices: tf.Tensor, values: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Each row once: the values of rows that are named several times are added up."""
    rows, place = tf.unique(indices)
    return rows, tf.math.unsorted_segment_sum(values, place, tf.size(rows))


class DenseSum(tf.Module):
    """A sum with the variable's own shape."""

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType):
        super().__init__()
        self.total = tf.Variable(tf.zeros(shape, dtype), **LOCAL)

    def clear(self) -> None:
        """Assigns zeros, whatever stood there."""
        self.total.assign(tf.zeros_like(self.total))

    def add(self, gradient: Gradient, weight: tf.Tensor) -> None:
        """Adds weight · gradient."""
        weight = tf.cast(weight, self.total.dtype)
        gradient = cast(gradient, self.total.dtype)
        if isinstance(gradient, tf.IndexedSlices):
            tf.raw_ops.ResourceScatterAdd(
                resource=self.total.handle, indices=gradient.indices, updates=gradient.values * weight
            )
        else:
            # var -= alpha·delta: the one op that adds a multiple in a single pass over memory.
            tf.raw_ops.ResourceApplyGradientDescent(var=self.total.handle, alpha=-weight, delta=gradient)

    def mean(self, factor: tf.Tensor) -> Gradient:
        """The sum times `factor`."""
        return scaled(tf.convert_to_tensor(self.total), factor)


class SparseSum(tf.Module):
    """A sum of the rows that were touched, each held once."""

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType):
        super().__init__()
        row = shape[1:]
        self.indices = tf.Variable(tf.zeros([0], tf.int64), shape=[None], **LOCAL)
        self.values = tf.Variable(tf.zeros([0, *row], dtype), shape=[None, *row], **LOCAL)
        self._shape: Any = shape

    def clear(self) -> None:
        """Forgets every row."""
        self.indices.assign(self.indices[:0])
        self.values.assign(self.values[:0])

    def add(self, gradient: Gradient, weight: tf.Tensor) -> None:
        """Adds weight · gradient to the rows that it names."""
        gradient = scaled(cast(gradient, self.values.dtype), weight)
        if isinstance(gradient, tf.IndexedSlices):
            rows, values = tf.cast(gradient.indices, tf.int64), gradient.values
        else:
            rows, values = tf.range(self._shape[0], dtype=tf.int64), gradient
        rows, values = merged(tf.concat([self.indices, rows], 0), tf.concat([self.values, values], 0))
        self.indices.assign(rows)
        self.values.assign(values)

    def mean(self, factor: tf.Tensor) -> Gradient:
        """The sum times `factor`, each row once."""
        values, rows = tf.convert_to_tensor(self.values), tf.convert_to_tensor(self.indices)
        return scaled(tf.IndexedSlices(values, rows, tf.constant(self._shape.as_list(), tf.int64)), factor)
