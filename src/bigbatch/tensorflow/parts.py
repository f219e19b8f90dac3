"""What a window of the split door is made of while it is open: a loss, its items, and gradients in three forms.

A dense layer's weight gradient is a product, leftᵀ · right, of the layer's inputs and its outputs' gradients, and the
sum over micro-batches is the product of the same with their rows put together. So where the two are much smaller than
what they come to, they are what is kept: one multiplication a window takes the place of one a micro-batch, and of a
pass through memory with each to add it up.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.tensorflow.checks import under_xla
from bigbatch.tensorflow.sums import Gradient, cast, merged, scaled

# How much smaller than the gradient the two have to be.
SMALL = 8


class Rows(NamedTuple):
    """A sparse gradient."""

    indices: tf.Tensor
    values: tf.Tensor


class Product(NamedTuple):
    """A gradient that is not multiplied out."""

    left: tf.Tensor  # shape=(rows, inputs)
    right: tf.Tensor  # shape=(rows, outputs)

    @property
    def shape(self) -> tuple[int, int]:
        """Of what it comes to."""
        (_, rows), (_, columns) = self._shapes()
        return rows, columns

    @property
    def size(self) -> int:
        """Of what is kept, in numbers."""
        return sum(math.prod(shape) for shape in self._shapes())

    def _shapes(self) -> list[Any]:
        return [side.shape.as_list() for side in self]

    def times(self, factor: tf.Tensor) -> tf.Tensor:
        """Multiplied out, times a scalar."""
        return tf.linalg.matmul(self.left, scaled(self.right, factor), transpose_a=True)


# None where the loss does not depend on the variable, a dense tensor, Rows or a Product.
Part = Any


class Kept(NamedTuple):
    """The products of a group of micro-batches while they come, in the order in which they come."""

    left: tf.TensorArray
    right: tf.TensorArray

    @classmethod
    def room_for(cls, size: int, like: Product) -> "Kept":
        """None yet."""
        return cls(*(tf.TensorArray(side.dtype, size, element_shape=side.shape) for side in like))

    def with_one_more(self, place: tf.Tensor, product: Any) -> "Kept":
        """And this one."""
        return Kept(self.left.write(place, product.left), self.right.write(place, product.right))

    def put_together(self) -> Product:
        """One product of all rows; where none came, they are zero."""
        return Product(*(tf.reshape(side.stack(), [-1, side.element_shape[1]]) for side in self))


class Room(NamedTuple):
    """For how many micro-batches products are kept, in parts of the memory that the gradients take."""

    alone: int  # where no sums are there until they are multiplied out: three quarters
    beside_sums: int  # a quarter


def room_for(parts: Iterable[Part]) -> Room | None:
    """None where there are no products."""
    products = [part for part in parts if isinstance(part, Product)]
    kept, whole = sum(p.size for p in products), sum(math.prod(p.shape) for p in products)
    return Room(3 * whole // (4 * kept), whole // (4 * kept)) if products else None


class Window(NamedTuple):
    """The sums of the micro-batches so far, each weighted with its items / unit (see `bigbatch.law`).

    The unit is the first micro-batch's items: weights are then near 1, so that a half-precision backward pass sees
    gradients of the size that it would see without a window, and a window of one is left as it is.
    """

    loss: tf.Tensor  # shape=()
    items: tf.Tensor  # shape=(), COUNT
    unit: tf.Tensor  # shape=(), COUNT; 0 before the first micro-batch
    gradients: list[Part]


def part_of(gradient: Gradient | None, weight: tf.Tensor | None, dtype: tf.DType) -> Part:
    """One micro-batch's gradient, times its weight, as it is kept."""
    if gradient is None:
        return None
    product = _product(gradient) if weight is None and gradient.dtype == dtype else None
    if product is not None:
        return product
    if isinstance(gradient, tf.IndexedSlices) and under_xla():
        gradient = tf.convert_to_tensor(gradient)
    wide = cast(gradient, dtype)
    wide = wide if weight is None else scaled(wide, weight)
    return Rows(wide.indices, wide.values) if isinstance(wide, tf.IndexedSlices) else wide


def _product(gradient: Gradient) -> Product | None:
    """The two factors, where a graph shows that the gradient is their product and that they are small."""
    if tf.executing_eagerly() or not isinstance(gradient, tf.Tensor) or gradient.op.type != "MatMul":
        return None
    if not gradient.op.get_attr("transpose_a") or gradient.op.get_attr("transpose_b"):
        return None
    product = Product(*gradient.op.inputs)
    known = product.left.shape.is_fully_defined() and product.right.shape.is_fully_defined()
    return product if known and SMALL * product.size <= math.prod(product.shape) else None


def joined(a: Window, b: Window) -> Window:
    """Two windows in one; the unit is the first one's, which the second was weighted with."""
    gradients = [add(g, h) for g, h in zip(a.gradients, b.gradients, strict=True)]
    return Window(a.loss + b.loss, a.items + b.items, b.unit, gradients)


def add(a: Part, b: Part) -> Part:
    """The sum of two gradients, either of which may be missing."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, Rows):
        return Rows(*merged(tf.concat([a.indices, b.indices], 0), tf.concat([a.values, b.values], 0)))
    if isinstance(a, Product) and isinstance(b, Product):
        return Product(tf.concat([a.left, b.left], 0), tf.concat([a.right, b.right], 0))
    return multiplied(a) + multiplied(b)


def multiplied(a: Part) -> tf.Tensor:
    """As a dense tensor."""
    return tf.linalg.matmul(a.left, a.right, transpose_a=True) if isinstance(a, Product) else a


def finished(gradient: Part, factor: tf.Tensor, variable: Any) -> Gradient | None:
    """The mean, as GradientTape would have returned it; a sparse one names each row once."""
    if gradient is None:
        return None
    if isinstance(gradient, Product):
        return gradient.times(factor)
    if isinstance(gradient, Rows):
        rows, values = merged(*gradient)
        gradient = tf.IndexedSlices(values, rows, tf.constant(tuple(variable.shape), rows.dtype))
    return cast(scaled(gradient, factor), tf.as_dtype(variable.dtype))
