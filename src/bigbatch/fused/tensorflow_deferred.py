"""Gradients of dense layers' weights as the products that they are, to be multiplied out once for many micro-batches.

Such a gradient is leftᵀ · right, of the layer's inputs and its outputs' gradients, and the sum over micro-batches is
the product of the same with their rows put together. So where the two are much smaller than what they come to, they
are what is kept: one multiplication a window takes the place of one a micro-batch, and of a pass through memory with
each to add it up.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import tensorflow as tf

# How much smaller than the gradient the two have to be.
SMALL = 8

# Where they wait in variables, a quarter of the gradient's memory has to have room for those of so many micro-batches.
FEW = 4


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
        """Multiplied out, times a scalar of any dtype."""
        return Product(self.left, self.right * tf.cast(factor, self.right.dtype)).multiplied()

    def multiplied(self) -> tf.Tensor:
        """As a dense tensor."""
        return tf.linalg.matmul(self.left, self.right, transpose_a=True)


def room_of(rows: int, columns: int, quarters: int = 1) -> int:
    """How many rows of both factors so many quarters of a matrix's memory hold."""
    return quarters * rows * columns // (4 * (rows + columns))


def in_turn(work: Callable[..., Any], *several: Iterable[Any]) -> list[Any]:
    """`map`, each after the one before: TensorFlow would multiply all products out before it adds the first."""
    made: list[Any] = []
    for each in zip(*several, strict=True):
        before = tf.nest.flatten(made[-1:], expand_composites=True)
        with tf.control_dependencies([x for x in before if x is not None]):
            made.append(work(*each))
    return made


def of_any_shape(x: Any) -> Any:
    """The same tensor, whose shape no graph knows: for all that is assigned to a variable that grows.

    Grappler takes a variable and what is assigned to it for of one shape. Where one thing's is known it folds
    `tf.shape` of the variable to that. Where those of two differ it forgets what it knew of the whole graph, and
    oneDNN's rewriting of a convolution then aborts the process. What a placeholder defaults to is the one value of
    which it makes no shape.
    """
    if tf.executing_eagerly():
        return x
    return tf.reshape(x, tf.compat.v1.placeholder_with_default(tf.shape(x), [x.shape.rank]))


def product_of(gradient: Any) -> Product | None:
    """The two factors, where a graph shows that the gradient is their product and that they are small."""
    product = factors_of(gradient)
    if product is None or not all(side.shape.is_fully_defined() for side in product):
        return None
    return product if SMALL * product.size <= math.prod(product.shape) else None


def factors_of(gradient: Any) -> Product | None:
    """The two factors, where a graph shows that the gradient is their product."""
    if tf.executing_eagerly() or not isinstance(gradient, tf.Tensor) or gradient.op.type != "MatMul":
        return None
    turned = gradient.op.get_attr("transpose_a"), gradient.op.get_attr("transpose_b")
    return Product(*gradient.op.inputs) if turned == (True, False) else None


class Kept(NamedTuple):
    """The products of a group of micro-batches while they come, in the order in which they come."""

    left: tf.TensorArray
    right: tf.TensorArray

    @classmethod
    def room_for(cls, size: Any, like: Product) -> "Kept":
        """None yet, of so many; of any number where `size` is None, which XLA has no room for."""
        options = {"size": 0, "dynamic_size": True} if size is None else {"size": size}
        return cls(*(tf.TensorArray(side.dtype, **options, element_shape=side.shape) for side in like))

    def emptied(self) -> "Kept":
        """Room for any number of others like these."""
        return Kept(*(tf.TensorArray(t.dtype, 0, dynamic_size=True, element_shape=t.element_shape) for t in self))

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


def room_for(parts: Iterable[Any]) -> Room | None:
    """None where there are no products."""
    products = [part for part in parts if isinstance(part, Product)]
    kept, whole = sum(p.size for p in products), sum(math.prod(p.shape) for p in products)
    return Room(3 * whole // (4 * kept), whole // (4 * kept)) if products else None
