"""Gradients summed over a loop without being made: the loop stacks their factors, and one matmul after it is the sum.

A dense layer's weight gradient is leftᵀ · right, and its sum over micro-batches is the product of the same with all
their rows. So where the factors are much smaller than the gradient, the loop stacks them, and one matmul takes the
place of one in each micro-batch and of a pass through memory to add it up. While factors are stacked, the sum itself is
not there; the stacks take half of what all such sums take, or as much as the largest, and memory does not grow.

Where the factors of all micro-batches would be too many, those of a few in a row are stacked, and their product is
added to the sum in pieces. The whole gradient, which a plain loop holds beside the sum, is never there, and the stacks
take no more than it would. A huge gradient is added in pieces in any case, while each piece is in the cache.

It buys up to a half of a window's time with micro-batches of few rows: benchmarks/jax_window.md and keras_fit.md. It
does nothing for fewer than four micro-batches, for many rows, in other dtypes than the sums', behind a `jax.checkpoint`
or a loop of the model's, on several devices, and on others than CPUs, where nobody has measured it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, primitives

from bigbatch.fused.jax_conv_layout import fast
from bigbatch.fused.jax_factors import (
    Cut,
    DenseGrad,
    FactoredGrad,
    PiecewiseGrad,
    Reader,
    TableGrad,
    aval,
    inlined,
    size_of,
    with_outputs,
)

# By what ratio one micro-batch's factors must be smaller than their product, and all that are stacked.
SMALL, SMALLER = 8, 4 / 3
# The stacks may take this part of what all products take.
SHARE = 1 / 2
# The fewest micro-batches for which factors are stacked: with two or three there is little to gain.
FEWEST = 4
# The fewest pieces in which a product is added, and the most bytes of one: caches hold that.
PIECES, PIECE = 4, 1 << 22
# From how many bytes on a product is quicker in pieces than whole: with small factors, and with any.
LARGE, HUGE = 3 << 20, 1 << 24


def is_on() -> bool:
    """On one CPU. Elsewhere nobody has measured it, and there sums may be spread over devices."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def scan(
    micro: Callable[[Any, Any], tuple[tuple[Any, Any], Any, Any]], zeros: Any, state: Any, xs: Any
) -> tuple[Any, Any, Any]:
    """The weighted sums of all micro-batches' gradients, by a `lax.scan`.

    Args:
        micro: (state, x) → ((gradients, weight), state, y), where the weight is a scalar, or None for 1.
        zeros: what the sums begin with, nested as the gradients are.
        state: what one micro-batch passes to the next.
        xs: what the micro-batches are given, along the leading dimension.

    Returns:
        The sums, the last state, and the ys, stacked.
    """
    first = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
    traced, shapes = jax.make_jaxpr(micro, return_shape=True)(state, first)
    begin, nesting = jax.tree.flatten(zeros)
    program = Program(fast(traced), begin, shapes, jax.tree.leaves(xs)[0].shape[0])
    (sums, state), (stacked, ys) = program.loop(state, xs)
    return jax.tree.unflatten(nesting, program.finish(sums, stacked)), state, ys


class Program:
    """A micro-batch's program that returns, for some gradients, their factors."""

    def __init__(self, traced: ClosedJaxpr, zeros: Sequence[Any], shapes: Any, count: int):
        self.zeros, self.shapes, self.count = zeros, shapes, count
        self.parts, self.group, program = _parts(traced, zeros, count)
        inputs = [v for parts in self.parts for part in parts for v in part.inputs]
        self.run = with_outputs(program, [*inputs, *program.jaxpr.outvars[len(zeros) :]])

    def loop(self, state: Any, xs: Any) -> Any:
        """The sums and the last state; then the stacked factors and the stacked ys."""
        sums = [
            None if all(isinstance(part, FactoredGrad) for part in parts) else zero
            for parts, zero in zip(self.parts, self.zeros, strict=True)
        ]

        def one(carry: Any, x: Any) -> Any:
            (sums, state), (stacked, factors, y) = self.body(carry, x)
            factors = jax.tree.map(lambda factor: factor[None], factors)
            return (self.with_piecewise(sums, factors), state), (stacked, y)

        def group(carry: Any, xs: Any) -> Any:
            (sums, state), (stacked, factors, ys) = lax.scan(self.body, carry, xs)
            return (self.with_piecewise(sums, factors), state), (stacked, ys)

        if self.group == 1:
            return lax.scan(one, (sums, state), xs)
        xs = jax.tree.map(lambda x: x.reshape(-1, self.group, *x.shape[1:]), xs)
        carry, each = lax.scan(group, (sums, state), xs)
        return carry, jax.tree.map(lambda y: y.reshape(self.count, *y.shape[2:]), each)

    def body(self, carry: Any, x: Any) -> Any:
        """One micro-batch: it carries the sums and the state, and yields the factors of both kinds, and y."""
        sums, state = carry
        outs = iter(self.run(*jax.tree.leaves((state, x))))
        values = [[part._replace(inputs=[next(outs) for _ in part.inputs]) for part in parts] for parts in self.parts]
        (_, weight), *rest = self.shapes
        weight, state, y = jax.tree.unflatten(jax.tree.structure((weight, *rest)), list(outs))
        totals, deferred, piecewise = [], [], []
        for parts, total in zip(values, sums, strict=True):
            for part in parts:
                if isinstance(part, FactoredGrad | PiecewiseGrad):
                    left, right = part.inputs
                    factors = _where_counted(weight, left), _weighted(weight, right)
                    (deferred if isinstance(part, FactoredGrad) else piecewise).append(factors)
                elif isinstance(part, TableGrad):
                    indices, updates = part.inputs
                    total = part._replace(inputs=[indices, _weighted(weight, updates)]).added_to(total)
                else:
                    total = total + _weighted(weight, part.inputs[0].astype(total.dtype))
            totals.append(total)
        return (totals, state), (deferred, piecewise, y)

    def with_piecewise(self, sums: Sequence[Any], factors: Sequence[Any]) -> list[Any]:
        """The sums with the products of a few micro-batches added in pieces."""
        stacks, totals = iter(factors), []
        for parts, total in zip(self.parts, sums, strict=True):
            for part in parts:
                if isinstance(part, PiecewiseGrad):
                    total = part._replace(inputs=next(stacks)).added_to(total)
            totals.append(total)
        return totals

    def finish(self, sums: Sequence[Any], stacked: Sequence[Any]) -> list[jax.Array]:
        """The sums with the products that were deferred to the end of the loop."""
        stacks, totals = iter(stacked), []
        for parts, total in zip(self.parts, sums, strict=True):
            for part in parts:
                if isinstance(part, FactoredGrad):
                    product = part._replace(inputs=next(stacks)).product()
                    total = product if total is None else total + product
            totals.append(total)
        return totals


def _weighted(weight: Any, x: jax.Array) -> jax.Array:
    """Weight · x. A mean over no items is 0/0; it counts for nothing, and 0 × NaN would be NaN."""
    return x if weight is None else _where_counted(weight, jnp.asarray(weight, x.dtype) * x)


def _where_counted(weight: Any, x: jax.Array) -> jax.Array:
    return x if weight is None else jnp.where(weight == 0, 0, x)


def _parts(traced: ClosedJaxpr, zeros: Sequence[Any], count: int) -> tuple[list[list[Any]], int, ClosedJaxpr]:
    """For each gradient, which come first in the program's results, the parts to add up.

    With it the number of micro-batches in a row whose factors are stacked for piecewise products, and the program that
    the parts are of.
    """
    if is_on() and count >= FEWEST:
        program = inlined(traced)
        reader = Reader(program.jaxpr)

        def read(chosen: dict[int, Cut | None] | None) -> list[list[Any]]:
            outs = zip(program.jaxpr.outvars, zeros, strict=False)
            return [reader.parts(v, zero.dtype, chosen) for v, zero in outs]

        products = [part for parts in read(None) for part in parts if isinstance(part, FactoredGrad)]
        deferred = _deferrable([product.dot for product in products], count)
        parts, group = read(_cuts(products, HUGE, 0) | deferred), 1
        cuts = {} if deferred else _cuts(products, LARGE, SMALL)
        while cuts and group == 1:
            piecewise = read(cuts)
            group = _group(piecewise, reader, zeros, count)
            parts = piecewise if group > 1 else parts
            cuts.popitem()
        if not all(isinstance(part, DenseGrad) for parts_of_one in parts for part in parts_of_one):
            return parts, group, program
    return [[DenseGrad([v])] for v in traced.jaxpr.outvars[: len(zeros)]], 1, traced


def _cuts(products: list[FactoredGrad], large: int, small: int) -> dict[int, Cut | None]:
    """Cuts of the products of at least `large` bytes, and `small` times as many as their factors; largest first."""
    worth = [p for p in products if size_of(p.dot.outvars) >= max(large, small * size_of(p.dot.invars))]
    worth.sort(key=lambda product: -size_of(product.dot.outvars))
    return {id(product.dot): cut for product in worth if (cut := _cut(product))}


def _deferrable(dots: Sequence[JaxprEqn], count: int) -> dict[int, Cut | None]:
    """The products whose factors are stacked until the end: from the first on, while the stacks have capacity."""
    small = max(SMALL, SMALLER * count)
    worth = [dot for dot in dots if small * size_of(dot.invars) <= size_of(dot.outvars)]
    sizes = [size_of(dot.outvars) for dot in worth]
    capacity = max([SHARE * sum(sizes), *sizes], default=0)
    chosen = {}
    for dot in worth:
        stack = count * size_of(dot.invars)
        if stack <= capacity:
            capacity -= stack
            chosen[id(dot)] = None
    return chosen


def _group(parts: list[list[Any]], reader: Reader, zeros: Sequence[Any], count: int) -> int:
    """How many micro-batches in a row may stack the factors of all piecewise products."""
    whole, factors = [0], 0  # bytes of gradients that exist at one time, and of one micro-batch's factors
    for part in (part for parts_of_one in parts for part in parts_of_one):
        if isinstance(part, DenseGrad):
            whole += [size_of([v]) for v in part.inputs if not reader.is_constant(v)]
        elif isinstance(part, PiecewiseGrad):
            whole.append(size_of(part.grad.dot.outvars) // part.cut.pieces)
            factors += size_of(part.inputs)
    capacity = max(zero.size * zero.dtype.itemsize for zero in zeros) - max(whole)
    return max(n for n in range(1, count + 1) if n == 1 or (count % n == 0 and n * factors <= capacity))


def _cut(product: FactoredGrad) -> Cut | None:
    """Cuts the product along its outermost axis that has about so many pieces of one length."""
    target = max(PIECES, math.ceil(size_of(product.dot.outvars) / PIECE))
    (contracted, _) = product.dot.params["dimension_numbers"]
    axes = [
        (side, axis + 1)  # stacked
        for side, (v, over) in enumerate(zip(product.inputs, contracted, strict=True))
        for axis in range(aval(v).ndim)
        if axis not in over
    ]
    for change in product.layout:
        if change.primitive is not primitives.transpose_p:
            return None
        axes = [axes[k] for k in change.params["permutation"]]
    for out, (side, axis) in enumerate(axes):
        length = aval(product.inputs[side]).shape[axis - 1]
        pieces = next((n for n in range(target, 4 * target) if length % n == 0), None)
        if pieces:
            return Cut(pieces, side, axis, out)
    return None
