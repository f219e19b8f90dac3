"""One variable's Σ wᵢ·gᵢ inside a window, dense or of the rows that were touched.

`start` assigns, so that nothing of an earlier window, NaN or the half of a failed one, is ever multiplied or added.
"""

from typing import Any

import tensorflow as tf

v1 = tf.compat.v1


def make_sum(grad: tf.Tensor | tf.IndexedSlices, variable: Any, dtype: tf.DType | None) -> "DenseSum | SparseSum":
    """The sum for one gradient: at least as wide as `dtype`, on the variable's device."""
    own = variable.dtype.base_dtype
    wide = own if dtype is None or own.size >= dtype.size else dtype
    with tf.device(variable.device):
        if isinstance(grad, tf.IndexedSlices):
            return SparseSum(grad, variable, wide)
        return DenseSum(grad, variable, wide)


class DenseSum:
    """One variable as large as the gradient."""

    def __init__(self, grad: tf.Tensor, variable: Any, dtype: tf.DType):
        self.grad, self.dtype = grad, dtype
        self.total = _variable(lambda: tf.zeros(variable.shape, dtype), f"{variable.op.name}/sum")

    @property
    def variables(self) -> list[Any]:
        """What a checkpoint holds."""
        return [self.total]

    def start(self, weight: tf.Tensor) -> tf.Operation:
        """Begins a window with the gradient times `weight`."""
        # A product even where the weight is 1: assigning a fed array itself would keep the caller's own memory.
        return self.total.assign(tf.cast(self.grad, self.dtype) * tf.cast(weight, self.dtype), read_value=False)

    def add(self, weight: tf.Tensor) -> tf.Operation:
        """Adds the gradient times `weight`."""
        # total -= (−w)·g in one pass and without a temporary; assign_add(w·g) would need both.
        return tf.raw_ops.ResourceApplyGradientDescent(
            var=self.total.handle,
            alpha=-tf.cast(weight, self.dtype),
            delta=tf.cast(self.grad, self.dtype),
            use_locking=True,
        )

    def read(self, factor: tf.Tensor | None = None) -> tf.Tensor:
        """The sum, times `factor`."""
        total = self.total.read_value()
        return total if factor is None else total * tf.cast(factor, self.dtype)


class SparseSum:
    """Row numbers, each once, and the rows' sums: as large as what was touched, never as the table."""

    def __init__(self, grad: tf.IndexedSlices, variable: Any, dtype: tf.DType):
        self.grad, self.dtype, self.shape = grad, dtype, variable.shape
        row = self.shape[1:]
        self.indices = _variable(
            lambda: tf.zeros([0], grad.indices.dtype), f"{variable.op.name}/sum_indices", tf.TensorShape([None])
        )
        self.values = _variable(
            lambda: tf.zeros([0, *row], dtype), f"{variable.op.name}/sum_values", tf.TensorShape([None, *row])
        )

    @property
    def variables(self) -> list[Any]:
        """What a checkpoint holds."""
        return [self.indices, self.values]

    def start(self, weight: tf.Tensor) -> tf.Operation:
        """Begins a window with the gradient's rows times `weight`."""
        return self._assign(self.grad.indices, self._weighted(weight))

    def add(self, weight: tf.Tensor) -> tf.Operation:
        """Adds the gradient's rows times `weight`; rows that are there already are summed."""
        return self._assign(
            tf.concat([self.indices.read_value(), self.grad.indices], 0),
            tf.concat([self.values.read_value(), self._weighted(weight)], 0),
        )

    def read(self, factor: tf.Tensor | None = None) -> tf.IndexedSlices:
        """The sum, times `factor`; each row once."""
        values, indices = self.values.read_value(), self.indices.read_value()
        if factor is not None:
            values *= tf.cast(factor, self.dtype)
        return tf.IndexedSlices(values, indices, tf.constant(self.shape.as_list(), indices.dtype))

    def _weighted(self, weight: tf.Tensor) -> tf.Tensor:
        return tf.cast(self.grad.values, self.dtype) * tf.cast(weight, self.dtype)

    def _assign(self, indices: tf.Tensor, values: tf.Tensor) -> tf.Operation:
        rows, place = tf.unique(indices)
        summed = tf.math.unsorted_segment_sum(values, place, tf.size(rows))
        return tf.group(self.indices.assign(rows, read_value=False), self.values.assign(summed, read_value=False))


def _variable(initial: Any, name: str, shape: tf.TensorShape | None = None) -> Any:
    """A resource variable whatever the default is: saved and initialized with the others, and not trained."""
    return v1.Variable(
        initial, trainable=False, use_resource=True, name=name, shape=shape, validate_shape=shape is None
    )
