"""One variable's Σ wᵢ·gᵢ inside a window, dense or of the rows that were touched.

`start` assigns, so that nothing of an earlier window, NaN or the half of a failed one, is ever multiplied or added.
"""

from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import of_any_shape
from bigbatch.engines.tensorflow_sparse import SparseRows, merged
from bigbatch.fused.tensorflow_deferred import FEW, FactoredGrad, factors_of, row_capacity
from bigbatch.fused.tensorflow_lookups import split_gradient
from bigbatch.tf1.control_flow import done

v1 = tf.compat.v1


def make_sum(grad: tf.Tensor | tf.IndexedSlices, variable: Any, dtype: tf.DType | None) -> Any:
    """The sum for one gradient: at least as wide as `dtype`, on the variable's device."""
    own = variable.dtype.base_dtype
    wide = own if dtype is None or own.size >= dtype.size else dtype
    with tf.device(variable.device):
        if isinstance(grad, tf.IndexedSlices):
            return SparseSum(grad, variable, wide)
        product = _product(grad) if grad.dtype == wide else None
        return DenseSum(grad, variable, wide) if product is None else ProductSum(product, variable)


def _product(grad: tf.Tensor) -> FactoredGrad | None:
    """A dense layer's inputs and its outputs' gradients, where one example's are much smaller than their product."""
    while grad.op.type == "Identity":  # as `gate_gradients` puts one after it
        grad = grad.op.inputs[0]
    product = factors_of(grad)
    if product is None or any(side.shape.rank is None for side in product):
        return None
    widths: list[Any] = [side.shape.as_list()[1] for side in product]
    return product if None not in widths and row_capacity(*widths) >= FEW else None


class DenseSum:
    """One variable as large as the gradient."""

    def __init__(self, grad: tf.Tensor, variable: Any, dtype: tf.DType):
        found = split_gradient(grad, variable.shape) if grad.dtype == dtype else None
        self._terms: list[Any] = [grad] if found is None else found.terms
        self.grad, self.dtype = tf.nest.flatten(self._terms)[-1], dtype
        self.total = _variable(lambda: tf.zeros(variable.shape, dtype), f"{variable.op.name}/sum")

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


class ProductSum:
    """A dense layer's gradient, leftᵀ · right: the rows of both are kept until they are computed as one matmul.

    That happens once a window, or more often where rows would take more than three quarters of the gradient's memory,
    and later, beside the total, more than a quarter.
    """

    def __init__(self, product: FactoredGrad, variable: Any):
        self.product, self.shape, self.dtype = product, variable.shape.as_list(), product.right.dtype
        self.grad = product.right  # with which the other is there too
        names = (f"{variable.op.name}/sum_{side}" for side in ("left", "right", "total"))
        self.left, self.right = (_growing([width], self.dtype, next(names)) for width in self.shape)
        self.total = _variable(lambda: tf.zeros([1, 1], self.dtype), next(names), tf.TensorShape([None, None]))

    @property
    def variables(self) -> list[Any]:
        """What a checkpoint holds."""
        return [self.left, self.right, self.total]

    def start(self, weight: tf.Tensor) -> tf.Operation:
        """Begins a window with the gradient times `weight`."""
        # A copy, as assigning a fed array itself would keep the caller's own memory.
        left, right = tf.raw_ops.DeepCopy(x=self.product.left), self._weighted(weight)
        return self._assign(left, right, tf.zeros([1, 1], self.dtype), new=True)

    def add(self, weight: tf.Tensor) -> tf.Operation:
        """Adds the gradient times `weight`."""
        left = tf.concat([self.left.read_value(), self.product.left], 0)
        right = tf.concat([self.right.read_value(), self._weighted(weight)], 0)
        return self._assign(left, right, self.total.read_value(), new=False)

    def read(self, factor: tf.Tensor | None = None) -> tf.Tensor:
        """The sum, times `factor`; what waited is then in the total, where there is one."""
        left, right, total = (v.read_value() for v in self.variables)
        by = None if factor is None else tf.cast(factor, self.dtype)

        def product() -> tf.Tensor:
            return tf.linalg.matmul(left, right if by is None else right * by, transpose_a=True)

        def whole() -> tf.Tensor:
            # Where the total stands: beside it there would be the product, its multiple and the sum of the two.
            more = of_any_shape(tf.linalg.matmul(left, right, transpose_a=True))
            added = self.total.assign_add(more, read_value=False)
            with tf.control_dependencies([added, _set(self.left, left[:0]), _set(self.right, right[:0])]):
                summed = self.total.read_value()
            return summed if by is None else summed * by

        return tf.ensure_shape(tf.cond(tf.equal(tf.size(total), 1), product, whole), self.shape)

    def _weighted(self, weight: tf.Tensor) -> tf.Tensor:
        return self.product.right * tf.cast(weight, self.dtype)

    def _assign(self, left: tf.Tensor, right: tf.Tensor, total: tf.Tensor, new: bool) -> tf.Operation:
        """Takes these rows, all of the window that are not in the total, which is a 1×1 zero where it holds none."""
        alone, beside_total = row_capacity(*self.shape, quarters=3), row_capacity(*self.shape)
        capacity = alone if new else tf.where(tf.equal(tf.size(total), 1), alone, beside_total)

        def keep() -> tf.Tensor:
            emptied = [_set(self.total, total)] if new else []
            return done(_set(self.left, left), _set(self.right, right), *emptied)

        def multiply() -> tf.Tensor:
            multiplied = total + tf.linalg.matmul(left, right, transpose_a=True)
            return done(_set(self.total, multiplied), _set(self.left, left[:0]), _set(self.right, right[:0]))

        return tf.cond(tf.shape(left)[0] <= capacity, keep, multiply).op


class SparseSum:
    """Row numbers, each once, and the rows' sums: as large as what was touched, never as the table."""

    def __init__(self, grad: tf.IndexedSlices, variable: Any, dtype: tf.DType):
        self.grad, self.dtype, self.shape = grad, dtype, variable.shape
        name = variable.op.name
        self.indices = _growing([], grad.indices.dtype, f"{name}/sum_indices")
        self.values = _growing(self.shape[1:], dtype, f"{name}/sum_values")

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
        return tf.group(_set(self.indices, rows.indices), _set(self.values, rows.values))


def _set(growing: Any, value: tf.Tensor) -> tf.Operation:
    return growing.assign(of_any_shape(value), read_value=False)


def _growing(row: Any, dtype: tf.DType, name: str) -> Any:
    """A variable of any number of rows, none at first."""
    return _variable(lambda: tf.zeros([0, *row], dtype), name, tf.TensorShape([None, *row]))


def _variable(initial: Any, name: str, shape: tf.TensorShape | None = None) -> Any:
    """A resource variable whatever the default is: saved and initialized with the others, and not trained."""
    begin = initial if shape is None else lambda: of_any_shape(initial())
    return v1.Variable(begin, trainable=False, use_resource=True, name=name, shape=shape, validate_shape=shape is None)
