"""One variable's Σ wᵢ·gᵢ inside a window, dense or of the rows that were touched.

`start` assigns, so that nothing of an earlier window, NaN or the half of a failed one, is ever multiplied or added.
"""

from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_sparse import SparseRows, merged
from bigbatch.engines.tensorflow_v1_variables import assign_rows, growing, variable_of

try:
    from bigbatch.fused import tf1 as fused
except ModuleNotFoundError:  # the folder was left out: every dense gradient goes into a variable of its size
    fused = None


def make_sum(grad: tf.Tensor | tf.IndexedSlices, variable: Any, dtype: tf.DType | None) -> Any:
    """The sum for one gradient: at least as wide as `dtype`, on the variable's device."""
    own = variable.dtype.base_dtype
    wide = own if dtype is None or own.size >= dtype.size else dtype
    with tf.device(variable.device):
        if isinstance(grad, tf.IndexedSlices):
            return SparseSum(grad, variable, wide)
        deferred = fused.deferred_sum(grad, variable) if fused is not None and grad.dtype == wide else None
        return deferred or DenseSum(grad, variable, wide)


class DenseSum:
    """One variable as large as the gradient."""

    def __init__(self, grad: tf.Tensor, variable: Any, dtype: tf.DType):
        found = fused.split_gradient(grad, variable.shape) if fused is not None and grad.dtype == dtype else None
        self._terms: list[Any] = [grad] if found is None else found.terms
        self.grad, self.dtype = tf.nest.flatten(self._terms)[-1], dtype
        self.total = variable_of(lambda: tf.zeros(variable.shape, dtype), f"{variable.op.name}/sum")

    @property
    def variables(self) -> list[Any]:
        """What a checkpoint holds."""
        return [self.total]

    def start(self, weight: tf.Tensor) -> tf.Operation:
        """Begins a window with the gradient times `weight`."""
        if isinstance(self._terms[0], SparseRows):
            return self._added(self._terms, weight, [self._set(tf.zeros(self.total.shape, self.dtype))])
        # A product even where the weight is 1: assigning a fed array itself would keep the caller's own memory.
        begun = self._set(self._wide(self._terms[0]) * self._wide(weight))
        return self._added(self._terms[1:], weight, [begun])

    def add(self, weight: tf.Tensor) -> tf.Operation:
        """Adds the gradient times `weight`."""
        return self._added(self._terms, weight, [])

    def read(self, factor: tf.Tensor | None = None) -> tf.Tensor:
        """The sum, times `factor`."""
        # A Saver restores a resource variable in whatever shape the checkpoint has.
        total = tf.ensure_shape(self.total.read_value(), self.total.shape)
        return total if factor is None else total * tf.cast(factor, self.dtype)

    def _set(self, value: tf.Tensor) -> tf.Operation:
        # Not `assign`, which would refuse for good where a checkpoint left another shape.
        return tf.raw_ops.AssignVariableOp(resource=self.total.handle, value=value)

    def _added(self, terms: list[Any], weight: tf.Tensor, after: list[tf.Operation]) -> tf.Operation:
        """Adds them one after the other, as floating-point sums depend on the order."""
        for term in terms:
            with tf.control_dependencies(after):
                after = [self._added_one(term, self._wide(weight))]
        return after[0]

    def _added_one(self, term: Any, weight: tf.Tensor) -> tf.Operation:
        handle = self.total.handle
        if isinstance(term, SparseRows):
            return tf.raw_ops.ResourceScatterAdd(resource=handle, indices=term.indices, updates=term.values * weight)
        # total -= (−w)·g in one pass and without a temporary; assign_add(w·g) would need both.
        return tf.raw_ops.ResourceApplyGradientDescent(
            var=handle, alpha=-weight, delta=self._wide(term), use_locking=True
        )

    def _wide(self, x: tf.Tensor) -> tf.Tensor:
        return tf.cast(x, self.dtype)


class SparseSum:
    """Row numbers, each once, and the rows' sums: as large as what was touched, never as the table."""

    def __init__(self, grad: tf.IndexedSlices, variable: Any, dtype: tf.DType):
        self.grad, self.dtype, self.shape = grad, dtype, variable.shape
        name = variable.op.name
        self.indices = growing([], grad.indices.dtype, f"{name}/sum_indices")
        self.values = growing(self.shape[1:], dtype, f"{name}/sum_values")

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
        values, indices = tf.ensure_shape(self.values.read_value(), [None, *self.shape[1:]]), self.indices.read_value()
        if factor is not None:
            values *= tf.cast(factor, self.dtype)
        return tf.IndexedSlices(values, indices, tf.constant(self.shape.as_list(), indices.dtype))

    def _weighted(self, weight: tf.Tensor) -> tf.Tensor:
        return tf.cast(self.grad.values, self.dtype) * tf.cast(weight, self.dtype)

    def _assign(self, indices: tf.Tensor, values: tf.Tensor) -> tf.Operation:
        rows = merged(indices, values)
        return tf.group(assign_rows(self.indices, rows.indices), assign_rows(self.values, rows.values))
