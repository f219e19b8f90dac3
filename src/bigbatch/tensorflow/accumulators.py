"""Running sums of one variable's gradients, Σ wᵢ·gᵢ, in variables that checkpoints and SavedModels find."""

from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import of_any_shape
from bigbatch.engines.tensorflow_sparse import Gradient, add_scaled, cast, merged, scaled
from bigbatch.tensorflow.window import fused

# Each replica of a strategy has its own sum, and a checkpoint holds the sum over them.
LOCAL = {
    "trainable": False,
    "synchronization": tf.VariableSynchronization.ON_READ,
    "aggregation": tf.VariableAggregation.SUM,
}


class DenseSum(tf.Module):
    """A sum with the variable's own shape."""

    saved_as = "DenseSum"  # in checkpoints

    def __init__(self, shape: tf.TensorShape, dtype: tf.DType):
        super().__init__()
        self.total = tf.Variable(tf.zeros(shape, dtype), **LOCAL)

    def clear(self) -> list[Any]:
        """Assigns zeros, whatever was there. Returns the operations that do."""
        return [self.total.assign(tf.zeros_like(self.total), read_value=False)]

    def add(self, gradient: Gradient, weight: tf.Tensor) -> list[Any]:
        """Adds weight · gradient. Returns the operations that do."""
        weight, gradient = tf.cast(weight, self.total.dtype), cast(gradient, self.total.dtype)
        terms = [gradient] if fused is None else fused.terms(gradient, self.total.shape)
        return [add_scaled(self.total, term, weight) for term in terms]

    def mean(self, factor: tf.Tensor) -> Gradient:
        """The sum times `factor`."""
        return scaled(tf.convert_to_tensor(self.total), factor)


class SparseSum(tf.Module):
    """A sum of the rows that were touched, each held once."""

    saved_as = "SparseSum"

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

    def add(self, gradient: Gradient, weight: tf.Tensor) -> list[Any]:
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


def kind(shape: tf.TensorShape, sparse: bool) -> Any:
    """The class of a sum for gradients of this shape."""
    if sparse:
        return SparseSum
    return DenseSum if fused is None or not fused.is_large(shape) else fused.DeferredSum


def description(one: Any) -> tuple[str, list[Any], str]:
    """The kind, the shape and the dtype of a sum, as a checkpoint has them."""
    total = one.values if isinstance(one, SparseSum) else one.total
    return one.saved_as, total.shape.as_list(), total.dtype.name
