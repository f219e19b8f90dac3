"""Gradients of dense layers' weights as two factors, multiplied as one matmul for many micro-batches.

The gradient of such a weight is leftᵀ · right, where left are the layer's inputs and right its outputs' gradients. The
sum over micro-batches is the product of all left rows and all right rows. Where the factors are much smaller than the
gradient, they are stored in its place. That saves all matmuls but one, and a pass over memory to add up each.

Measured in benchmarks/tensorflow_window.md, tf1.md and keras_fit.md (multilayer perceptrons and the transformer). It
does nothing outside a graph, for large micro-batches and small weights, and for gradients that are clipped, cast or
scaled before bigbatch sees them.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import tensorflow as tf

# How much smaller than the gradient the two factors have to be.
SMALL = 8

# A sum in variables stores factors only if a quarter of its memory holds those of so many micro-batches.
FEW = 4


class FactoredGrad(NamedTuple):
    """A gradient leftᵀ · right that is not multiplied yet."""

    left: tf.Tensor  # shape=(rows, inputs)
    right: tf.Tensor  # shape=(rows, outputs)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        (_, inputs), (_, outputs) = self._shapes()
        return inputs, outputs

    @property
    def dtype(self) -> tf.DType:
        """Of the product."""
        return self.right.dtype

    @property
    def size(self) -> int:
        """How many numbers both factors have."""
        return sum(math.prod(shape) for shape in self._shapes())

    def _shapes(self) -> list[Any]:
        return [side.shape.as_list() for side in self]

    def to_dense(self) -> tf.Tensor:
        """The product."""
        return tf.linalg.matmul(self.left, self.right, transpose_a=True)

    def times(self, factor: tf.Tensor) -> tf.Tensor:
        """The product times a scalar of any dtype."""
        return FactoredGrad(self.left, self.right * tf.cast(factor, self.right.dtype)).to_dense()

    def concat(self, other: "FactoredGrad") -> "FactoredGrad":
        """The sum of two products, as one product of the rows of both."""
        return FactoredGrad(*(tf.concat(sides, 0) for sides in zip(self, other, strict=True)))


def row_capacity(inputs: int, outputs: int, quarters: int = 1) -> int:
    """How many rows of both factors fit into so many quarters of the gradient's memory."""
    return quarters * inputs * outputs // (4 * (inputs + outputs))


def factored_grad(gradient: Any) -> FactoredGrad | None:
    """The two factors, where a graph shows that the gradient is their product and that they are small."""
    factors = factors_of(gradient)
    if factors is None or not all(side.shape.is_fully_defined() for side in factors):
        return None
    return factors if SMALL * factors.size <= math.prod(factors.shape) else None


def factors_of(gradient: Any) -> FactoredGrad | None:
    """The two factors, where a graph shows that the gradient is their product."""
    if tf.executing_eagerly() or not isinstance(gradient, tf.Tensor) or gradient.op.type != "MatMul":
        return None
    transposed = gradient.op.get_attr("transpose_a"), gradient.op.get_attr("transpose_b")
    return FactoredGrad(*gradient.op.inputs) if transposed == (True, False) else None


class FactorBuffer(NamedTuple):
    """The factors of some micro-batches inside a loop, one entry a micro-batch."""

    left: tf.TensorArray
    right: tf.TensorArray

    @classmethod
    def empty(cls, size: Any, like: FactoredGrad) -> "FactorBuffer":
        """For so many micro-batches; for any number where `size` is None, which XLA cannot allocate."""
        options = {"size": 0, "dynamic_size": True} if size is None else {"size": size}
        return cls(*(tf.TensorArray(side.dtype, **options, element_shape=side.shape) for side in like))

    def emptied(self) -> "FactorBuffer":
        """An empty buffer for any number of micro-batches like these."""
        return FactorBuffer(
            *(tf.TensorArray(t.dtype, 0, dynamic_size=True, element_shape=t.element_shape) for t in self)
        )

    def write(self, place: tf.Tensor, factors: Any) -> "FactorBuffer":
        """With one micro-batch's factors at this place."""
        return FactorBuffer(self.left.write(place, factors.left), self.right.write(place, factors.right))

    def concat(self) -> FactoredGrad:
        """One product of all rows; the rows of places that were not written are zero."""
        return FactoredGrad(*(tf.reshape(side.stack(), [-1, side.element_shape[1]]) for side in self))


class Capacity(NamedTuple):
    """For how many micro-batches factors are stored, as a part of the memory that the gradients take."""

    alone: int  # three quarters: no sum is there until the factors are multiplied
    beside_sums: int  # one quarter


def capacity(gradients: Iterable[Any]) -> Capacity | None:
    """Of a loop over micro-batches with these gradients; None where none is factored."""
    factored = [gradient for gradient in gradients if isinstance(gradient, FactoredGrad)]
    stored, dense = sum(g.size for g in factored), sum(math.prod(g.shape) for g in factored)
    return Capacity(3 * dense // (4 * stored), dense // (4 * stored)) if factored else None
