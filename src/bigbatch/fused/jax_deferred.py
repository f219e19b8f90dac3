"""Gradients summed over a loop without being made: what a micro-batch's gradient is of, where that is much smaller.

A dense layer's weight gradient is leftᵀ · right, of the layer's inputs and its outputs' gradients, and the sum over
micro-batches is the product of the same with their rows put together. So the loop keeps the two, and one multiplication
after it takes the place of one in each micro-batch and of a pass through memory to add it up.

The sums of gradients that are products alone are not there until the end, and the loop by hand holds the sums and one
gradient beside them. So as much is kept as half the products take, or the largest of them, and no more memory is taken.

Where all micro-batches' factors would be too many, those of a few in a row are kept, and multiplied out in pieces that
are added to the sum at once. The whole gradient, which the loop by hand holds beside the sum, is then never there, and
its memory is lent to the factors. So is a huge product added, whatever its factors take: a piece is in the cache still.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun, primitives

from bigbatch.fused.jax_conv_layout import fast

# How much smaller than their product one micro-batch's factors have to be, and how much smaller all that are kept.
SMALL, SMALLER = 8, 4 / 3
# Of what all products take, the part that is lent to factors.
ROOM = 1 / 2
# The fewest micro-batches of which products are kept: of two or three there is little to spare.
FEWEST = 4
# The fewest pieces in which a product is multiplied out and added, and the most bytes of one: caches hold that.
PIECES, PIECE = 4, 1 << 22
# The fewest bytes of such a product where it was quicker than to add it whole: of small factors, and of any.
LARGE, HUGE = 3 << 20, 1 << 24


class Product(NamedTuple):
    """Part of a gradient: `turns` of a `dot_general`, whose factors are kept until the end."""

    of: list[Any]  # the two factors: variables, or what they hold, stacked
    dot: JaxprEqn
    turns: list[JaxprEqn]  # transpositions and reshapes, in order

    def multiplied(self) -> jax.Array:
        """Of all micro-batches, whose number is the factors' first dimension."""
        (left, right), (batch_left, batch_right) = self.dot.params["dimension_numbers"]
        shifted = [(0, *(axis + 1 for axis in axes)) for axes in (left, right)]
        numbers = (tuple(shifted), (batch_left, batch_right))
        value = lax.dot_general_p.bind(*self.of, **{**self.dot.params, "dimension_numbers": numbers})
        for turn in self.turns:
            value = turn.primitive.bind(value, **turn.params)
        return value


class Cut(NamedTuple):
    """How a product of stacked factors is cut in pieces."""

    pieces: int
    side: int  # which factor is cut
    axis: int  # where
    out: int  # which axis of the product, after all turns, that is


class InPieces(NamedTuple):
    """Part of a gradient: a product that is added to the sum in the loop, once for a few micro-batches."""

    of: list[Any]  # as the product's
    product: Product
    cut: Cut

    def added_to(self, total: jax.Array) -> jax.Array:
        """A sum with this in it, multiplied out piece by piece."""
        pieces, side, axis, out = self.cut
        size = total.shape[out] // pieces

        def add(i: Any, total: jax.Array) -> jax.Array:
            of = list(self.of)
            of[side] = lax.dynamic_slice_in_dim(of[side], i * size, size, axis)
            piece = lax.dynamic_slice_in_dim(total, i * size, size, out)
            piece = piece + self.product._replace(of=of).multiplied()
            return lax.dynamic_update_slice_in_dim(total, piece, i * size, out)

        return lax.fori_loop(0, pieces, add, total)


class Rows(NamedTuple):
    """Part of a gradient: a `scatter-add` to zeros, as of a table that was looked up."""

    of: list[Any]  # the indices and the updates
    scatter: JaxprEqn

    def added_to(self, total: jax.Array) -> jax.Array:
        """A sum with this in it, where it stands: nothing of the table's size is made."""
        return lax.scatter_add_p.bind(total, *self.of, **self.scatter.params)


class Dense(NamedTuple):
    """Part of a gradient, as it is."""

    of: list[Any]


def is_on() -> bool:
    """On one CPU. Nobody has measured what it comes to elsewhere, and there sums may be spread over devices."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def scan(
    micro: Callable[[Any, Any], tuple[tuple[Any, Any], Any, Any]], zeros: Any, state: Any, xs: Any
) -> tuple[Any, Any, Any]:
    """The weighted sums of all micro-batches' gradients, by a `lax.scan`.

    Args:
        micro: (state, x) → ((gradients, weight), state, y), where the weight is a scalar, or None for 1.
        zeros: what to begin the sums with, nested as the gradients are.
        state: what `micro` hands on.
        xs: what the micro-batches get, along the leading dimension.

    Returns:
        The sums, the last state, and the ys, stacked.
    """
    first = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
    traced, shapes = jax.make_jaxpr(micro, return_shape=True)(state, first)
    begin, nesting = jax.tree.flatten(zeros)
    program = Program(fast(traced), begin, shapes, jax.tree.leaves(xs)[0].shape[0])
    (sums, state), (kept, ys) = program.loop(state, xs)
    return jax.tree.unflatten(nesting, program.finish(sums, kept)), state, ys


class Program:
    """A micro-batch's program, which gives the factors of some gradients in place of these."""

    def __init__(self, traced: ClosedJaxpr, zeros: Sequence[Any], shapes: Any, count: int):
        self.zeros, self.shapes, self.count = zeros, shapes, count
        self.parts, self.group, program = _parts(traced, zeros, count)
        gradients = [v for several in self.parts for part in several for v in part.of]
        outs = [*gradients, *program.jaxpr.outvars[len(zeros) :]]
        self.run = jaxpr_as_fun(program.replace(jaxpr=program.jaxpr.replace(outvars=outs)))

    def loop(self, state: Any, xs: Any) -> Any:
        """Of all micro-batches: the sums and the last state, and what each of them yields, stacked."""
        sums = [
            None if all(isinstance(part, Product) for part in several) else zero
            for several, zero in zip(self.parts, self.zeros, strict=True)
        ]

        def one(carry: Any, x: Any) -> Any:
            (sums, state), (kept, factors, y) = self.body(carry, x)
            factors = jax.tree.map(lambda factor: factor[None], factors)
            return (self.added(sums, factors), state), (kept, y)

        def few(carry: Any, xs: Any) -> Any:
            (sums, state), (kept, factors, ys) = lax.scan(self.body, carry, xs)
            return (self.added(sums, factors), state), (kept, ys)

        if self.group == 1:
            return lax.scan(one, (sums, state), xs)
        xs = jax.tree.map(lambda x: x.reshape(-1, self.group, *x.shape[1:]), xs)
        carry, each = lax.scan(few, (sums, state), xs)
        return carry, jax.tree.map(lambda y: y.reshape(self.count, *y.shape[2:]), each)

    def body(self, carry: Any, x: Any) -> Any:
        """Of the scan: it carries the sums and the state, and yields the factors that are kept for long and for few."""
        sums, state = carry
        outs = iter(self.run(*jax.tree.leaves((state, x))))
        parts = [[part._replace(of=[next(outs) for _ in part.of]) for part in several] for several in self.parts]
        (_, weight), *rest = self.shapes
        weight, state, y = jax.tree.unflatten(jax.tree.structure((weight, *rest)), list(outs))
        totals, kept, few = [], [], []
        for several, total in zip(parts, sums, strict=True):
            for part in several:
                if isinstance(part, Product | InPieces):
                    left, right = part.of
                    factors = _where_counted(weight, left), _weighed(weight, right)
                    (kept if isinstance(part, Product) else few).append(factors)
                elif isinstance(part, Rows):
                    indices, updates = part.of
                    total = part._replace(of=[indices, _weighed(weight, updates)]).added_to(total)
                else:
                    total = total + _weighed(weight, part.of[0].astype(total.dtype))
            totals.append(total)
        return (totals, state), (kept, few, y)

    def added(self, sums: Sequence[Any], factors: Sequence[Any]) -> list[Any]:
        """The sums with the products of a few micro-batches in them."""
        of, totals = iter(factors), []
        for several, total in zip(self.parts, sums, strict=True):
            for part in several:
                if isinstance(part, InPieces):
                    total = part._replace(of=next(of)).added_to(total)
            totals.append(total)
        return totals

    def finish(self, sums: Sequence[Any], kept: Sequence[Any]) -> list[jax.Array]:
        """The sums with the products in them that were kept until the end."""
        of, finished = iter(kept), []
        for several, total in zip(self.parts, sums, strict=True):
            for part in several:
                if isinstance(part, Product):
                    product = part._replace(of=next(of)).multiplied()
                    total = product if total is None else total + product
            finished.append(total)
        return finished


def _weighed(weight: Any, x: jax.Array) -> jax.Array:
    """Weight · x. A mean over no items is 0/0; it counts for nothing, and 0 × NaN would be NaN."""
    return x if weight is None else _where_counted(weight, jnp.asarray(weight, x.dtype) * x)


def _where_counted(weight: Any, x: jax.Array) -> jax.Array:
    return x if weight is None else jnp.where(weight == 0, 0, x)


def _parts(traced: ClosedJaxpr, zeros: Sequence[Any], count: int) -> tuple[list[list[Any]], int, ClosedJaxpr]:
    """What to add up for each gradient, which come first in the program's results.

    With it, of how many micro-batches in a row the factors of those products are kept that are cut, and the program
    that gives it all.
    """
    if is_on() and count >= FEWEST:
        program = _inlined(traced)
        reader = _Reader(program.jaxpr)

        def read(chosen: dict[int, Cut | None] | None) -> list[list[Any]]:
            outs = zip(program.jaxpr.outvars, zeros, strict=False)
            return [reader.parts(v, zero.dtype, chosen) for v, zero in outs]

        products = [part for several in read(None) for part in several if isinstance(part, Product)]
        chosen = _fitting([product.dot for product in products], count)
        parts, group = read(_cuts(products, HUGE, 0) | chosen), 1
        few = {} if chosen else _cuts(products, LARGE, SMALL)
        while few and group == 1:
            cut = read(few)
            group = _group(cut, reader, zeros, count)
            parts = cut if group > 1 else parts
            few.popitem()
        if not all(isinstance(part, Dense) for several in parts for part in several):
            return parts, group, program
    return [[Dense([v])] for v in traced.jaxpr.outvars[: len(zeros)]], 1, traced


def _cuts(products: list[Product], large: int, small: int) -> dict[int, Cut | None]:
    """How to cut those of so many bytes and factors so much smaller, the largest first."""
    worth = [p for p in products if _bytes(p.dot.outvars) >= max(large, small * _bytes(p.dot.invars))]
    worth.sort(key=lambda product: -_bytes(product.dot.outvars))
    return {id(product.dot): cut for product in worth if (cut := _cut(product))}


def _fitting(dots: Sequence[JaxprEqn], count: int) -> dict[int, Cut | None]:
    """Those to be kept until the end: as many, from the first, as there is room for the factors of."""
    small = max(SMALL, SMALLER * count)
    worth = [dot for dot in dots if small * _bytes(dot.invars) <= _bytes(dot.outvars)]
    sizes = [_bytes(dot.outvars) for dot in worth]
    room = max([ROOM * sum(sizes), *sizes], default=0)
    chosen = {}
    for dot in worth:
        kept = count * _bytes(dot.invars)
        if kept <= room:
            room -= kept
            chosen[id(dot)] = None
    return chosen


def _group(parts: list[list[Any]], reader: "_Reader", zeros: Sequence[Any], count: int) -> int:
    """Of how many micro-batches in a row there is room for the factors of all products that are cut."""
    made, factors = [0], 0  # what is there of a gradient at one time
    for several in parts:
        for part in several:
            if isinstance(part, Dense):
                made += [_bytes([v]) for v in part.of if not reader.is_constant(v)]
            elif isinstance(part, InPieces):
                made.append(_bytes(part.product.dot.outvars) // part.cut.pieces)
                factors += _bytes(part.of)
    room = max(zero.size * zero.dtype.itemsize for zero in zeros) - max(made)
    return max(n for n in range(1, count + 1) if n == 1 or (count % n == 0 and n * factors <= room))


def _cut(product: Product) -> Cut | None:
    """In which pieces to multiply it out: along its outermost axis that has about so many of one length."""
    wanted = max(PIECES, math.ceil(_bytes(product.dot.outvars) / PIECE))
    (contracted, _) = product.dot.params["dimension_numbers"]
    axes = [
        (side, axis + 1)  # stacked
        for side, (v, over) in enumerate(zip(product.of, contracted, strict=True))
        for axis in range(_aval(v).ndim)
        if axis not in over
    ]
    for turn in product.turns:
        if turn.primitive is not primitives.transpose_p:
            return None
        axes = [axes[k] for k in turn.params["permutation"]]
    for out, (side, axis) in enumerate(axes):
        length = _aval(product.of[side]).shape[axis - 1]
        pieces = next((n for n in range(wanted, 4 * wanted) if length % n == 0), None)
        if pieces:
            return Cut(pieces, side, axis, out)
    return None


def _bytes(variables: Sequence[Any]) -> int:
    return sum(v.aval.size * v.aval.dtype.itemsize for v in variables)


class _Reader:
    """What the variables of a program are made of."""

    def __init__(self, program: Jaxpr):
        self.made = {v: equation for equation in program.eqns for v in equation.outvars}
        used = [*(v for equation in program.eqns for v in equation.invars), *program.outvars]
        self.used = Counter(v for v in used if isinstance(v, Var))

    def parts(self, v: Any, dtype: Any, chosen: dict[int, Cut | None] | None) -> list[Any]:
        """What to add up in place of `v`, all of it of that dtype: `v` itself, where nothing better is in it.

        All products are chosen where `chosen` is None.
        """
        found = self._terms(v, dtype, [], chosen)
        return [Dense([v])] if all(isinstance(part, Dense) for part in found) else found

    def _terms(self, v: Any, dtype: Any, turns: list[JaxprEqn], chosen: dict[int, Cut | None] | None) -> list[Any]:
        made = self.made.get(v) if isinstance(v, Var) and self.used[v] == 1 and _aval(v).dtype == dtype else None
        if made is None:
            return [Dense([v])]
        if made.primitive is primitives.add_jaxvals_p and not turns:
            return [part for side in made.invars for part in self.parts(side, dtype, chosen)]
        if made.primitive in (primitives.transpose_p, primitives.reshape_p):
            return self._terms(made.invars[0], dtype, [made, *turns], chosen)
        is_chosen = chosen is None or id(made) in chosen
        if made.primitive is primitives.dot_general_p and is_chosen and _is_product(made, dtype):
            product, cut = Product(list(made.invars), made, turns), chosen[id(made)] if chosen else None
            return [product if cut is None else InPieces(product.of, product, cut)]
        if made.primitive is lax.scatter_add_p and not turns and self.is_constant(made.invars[0], 0):
            return [Rows(list(made.invars[1:]), made)]
        return [Dense([v])]

    def is_constant(self, v: Any, value: Any = None) -> bool:
        """Whether a variable is one number over and over, which XLA does not make; that number, where one is given."""
        made = self.made.get(v) if isinstance(v, Var) else None
        if made is None or made.primitive is not lax.broadcast_in_dim_p or not isinstance(made.invars[0], Literal):
            return False
        return value is None or made.invars[0].val == value


def _is_product(dot: JaxprEqn, dtype: Any) -> bool:
    _, over = dot.params["dimension_numbers"]
    return over == ((), ()) and all(_aval(side).dtype == dtype for side in dot.invars)


def _aval(v: Any) -> Any:
    return v.aval


def _inlined(program: ClosedJaxpr) -> ClosedJaxpr:
    """The same without the `jax.jit`s in it, behind which nothing is seen."""

    def run(program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        values = dict(zip([*program.jaxpr.constvars, *program.jaxpr.invars], [*program.consts, *args], strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else values[v]

        for equation in program.jaxpr.eqns:
            given = list(map(read, equation.invars))
            if equation.primitive is primitives.jit_p:
                found = run(equation.params["jaxpr"], given)
            else:
                found = _evaluated(equation, given)
            values.update(zip(equation.outvars, found, strict=True))
        return list(map(read, program.jaxpr.outvars))

    return jax.make_jaxpr(lambda *args: run(program, args))(*(v.aval for v in program.jaxpr.invars))


def _evaluated(equation: JaxprEqn, given: list[Any]) -> list[Any]:
    # The primitive's own way to be bound anew is no documented one; a test has a `custom_jvp` go through it.
    found = equation.primitive.bind(*given, **equation.primitive.get_bind_params(equation.params))
    return found if equation.primitive.multiple_results else [found]
