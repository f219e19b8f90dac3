"""What `bigbatch.tf1` calls of the speed wing: sums of dense layers' gradients, as one matmul a window.

It buys the pass over a matrix that each micro-batch would take (benchmarks/tf1.md, the MLPs). It does nothing for
gradients that are no product of two factors, and where a micro-batch has nearly as many rows as the matrix.
"""

from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import done, of_any_shape
from bigbatch.engines.tensorflow_v1_variables import assign_rows, growing, variable_of
from bigbatch.fused.tensorflow_deferred import FEW, FactoredGrad, factors_of, row_capacity
from bigbatch.fused.tensorflow_lookups import split_gradient as split_gradient


def deferred_sum(grad: tf.Tensor, variable: Any) -> "DeferredSum | None":
    """For a dense layer's gradient whose factors, of one example, are much smaller than it; None for others."""
    while grad.op.type == "Identity":  # as `gate_gradients` puts one after it
        grad = grad.op.inputs[0]
    product = factors_of(grad)
    if product is None or any(side.shape.rank is None for side in product):
        return None
    widths: list[Any] = [side.shape.as_list()[1] for side in product]
    return DeferredSum(product, variable) if None not in widths and row_capacity(*widths) >= FEW else None


class DeferredSum:
    """A dense layer's gradient, leftᵀ · right: the rows of both are kept until they are computed as one matmul.

    That happens once a window, or more often where rows would take more than three quarters of the gradient's memory,
    and later, beside the total, more than a quarter.
    """

    def __init__(self, product: FactoredGrad, variable: Any):
        self.product, self.shape, self.dtype = product, variable.shape.as_list(), product.right.dtype
        self.grad = product.right  # with which the other is there too
        names = (f"{variable.op.name}/sum_{side}" for side in ("left", "right", "total"))
        self.left, self.right = (growing([width], self.dtype, next(names)) for width in self.shape)
        self.total = variable_of(lambda: tf.zeros([1, 1], self.dtype), next(names), tf.TensorShape([None, None]))

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
        """The sum, times `factor`; what was deferred is then in the total, where there is one."""
        left, right, total = (v.read_value() for v in self.variables)
        by = None if factor is None else tf.cast(factor, self.dtype)

        def product() -> tf.Tensor:
            return tf.linalg.matmul(left, right if by is None else right * by, transpose_a=True)

        def whole() -> tf.Tensor:
            # Where the total stands: beside it there would be the product, its multiple and the sum of the two.
            more = of_any_shape(tf.linalg.matmul(left, right, transpose_a=True))
            added = self.total.assign_add(more, read_value=False)
            with tf.control_dependencies([added, assign_rows(self.left, left[:0]), assign_rows(self.right, right[:0])]):
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
            emptied = [assign_rows(self.total, total)] if new else []
            return done(assign_rows(self.left, left), assign_rows(self.right, right), *emptied)

        def multiply() -> tf.Tensor:
            multiplied = total + tf.linalg.matmul(left, right, transpose_a=True)
            return done(
                assign_rows(self.total, multiplied),
                assign_rows(self.left, left[:0]),
                assign_rows(self.right, right[:0]),
            )

        return tf.cond(tf.shape(left)[0] <= capacity, keep, multiply).op
