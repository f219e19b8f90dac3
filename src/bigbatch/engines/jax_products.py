"""Gradients summed over a loop without being made: what a micro-batch's gradient is of, where that is much smaller.

A dense layer's weight gradient is leftᵀ · right, of the layer's inputs and its outputs' gradients, and the sum over
micro-batches is the product of the same with their rows put together. So the loop keeps the two, and one multiplication
after it takes the place of one in each micro-batch and of a pass through memory to add it up.

The sums of gradients that are products alone are not there until the end, and the loop by hand holds the sums and one
gradient beside them. So as much is kept as half the products take, or the largest of them, and no more memory is taken.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun, primitives

from bigbatch.engines.jax_convolutions import fast

# How much smaller than their product one micro-batch's factors have to be, and how much smaller all that are kept.
SMALL, SMALLER = 8, 4 / 3
# Of what all products take, the part that is lent to factors.
ROOM = 1 / 2
# The fewest micro-batches of which products are kept: of two or three there is little to spare.
FEWEST = 4


class Product(NamedTuple):
    """Part of a gradient: `turns` of a `dot_general`."""

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
    (sums, state), (kept, ys) = lax.scan(program.body, (program.begin(), state), xs)
    return jax.tree.unflatten(nesting, program.finish(sums, kept)), state, ys


class Program:
    """A micro-batch's program, which gives the factors of some gradients in place of these."""

    def __init__(self, traced: ClosedJaxpr, zeros: Sequence[Any], shapes: Any, count: int):
        self.zeros, self.shapes = zeros, shapes
        self.parts, program = _parts(traced, zeros, count)
        gradients = [v for several in self.parts for part in several for v in part.of]
        outs = [*gradients, *program.jaxpr.outvars[len(zeros) :]]
        self.run = jaxpr_as_fun(program.replace(jaxpr=program.jaxpr.replace(outvars=outs)))

    def begin(self) -> list[Any]:
        """The sums before the first micro-batch; None where the loop adds nothing up."""
        return [
            None if all(isinstance(part, Product) for part in several) else zero
            for several, zero in zip(self.parts, self.zeros, strict=True)
        ]

    def body(self, carry: Any, x: Any) -> Any:
        """Of the scan: it carries the sums and the state, and yields what is kept of the products."""
        sums, state = carry
        outs = iter(self.run(*jax.tree.leaves((state, x))))
        parts = [[part._replace(of=[next(outs) for _ in part.of]) for part in several] for several in self.parts]
        (_, weight), *rest = self.shapes
        weight, state, y = jax.tree.unflatten(jax.tree.structure((weight, *rest)), list(outs))
        totals, kept = [], []
        for several, total in zip(parts, sums, strict=True):
            for part in several:
                if isinstance(part, Product):
                    left, right = part.of
                    kept.append((_where_counted(weight, left), _weighed(weight, right)))
                else:
                    total = total + _weighed(weight, part.of[0].astype(total.dtype))
            totals.append(total)
        return (totals, state), (kept, y)

    def finish(self, sums: Sequence[Any], kept: Sequence[Any]) -> list[jax.Array]:
        """The sums with the products in them."""
        factors, finished = iter(kept), []
        for several, total in zip(self.parts, sums, strict=True):
            for part in several:
                if isinstance(part, Product):
                    product = part._replace(of=next(factors)).multiplied()
                    total = product if total is None else total + product
            finished.append(total)
        return finished


def _weighed(weight: Any, x: jax.Array) -> jax.Array:
    """Weight · x. A mean over no items is 0/0; it counts for nothing, and 0 × NaN would be NaN."""
    return x if weight is None else _where_counted(weight, jnp.asarray(weight, x.dtype) * x)


def _where_counted(weight: Any, x: jax.Array) -> jax.Array:
    return x if weight is None else jnp.where(weight == 0, 0, x)


def _parts(traced: ClosedJaxpr, zeros: Sequence[Any], count: int) -> tuple[list[list[Any]], ClosedJaxpr]:
    """What to add up for each gradient, which come first in the program's results, and the program that gives it."""
    if is_on() and count >= FEWEST:
        program = _inlined(traced)
        reader = _Reader(program.jaxpr, count)
        outs = list(zip(program.jaxpr.outvars, zeros, strict=False))
        for v, zero in outs:
            reader.parts(v, zero.dtype)
        reader.chosen = _fitting(reader.seen, count)
        if reader.chosen:
            return [reader.parts(v, zero.dtype) for v, zero in outs], program
    return [[Dense([v])] for v in traced.jaxpr.outvars[: len(zeros)]], traced


def _fitting(dots: Sequence[JaxprEqn], count: int) -> list[JaxprEqn]:
    """As many of them, from the first, as there is room for the factors of."""
    sizes = [_bytes(dot.outvars) for dot in dots]
    room = max([ROOM * sum(sizes), *sizes])
    chosen = []
    for dot in dots:
        kept = count * _bytes(dot.invars)
        if kept <= room:
            room -= kept
            chosen.append(dot)
    return chosen


def _bytes(variables: Sequence[Any]) -> int:
    return sum(v.aval.size * v.aval.dtype.itemsize for v in variables)


class _Reader:
    """What the variables of a program are made of."""

    def __init__(self, program: Jaxpr, count: int):
        self.count = count
        self.seen: list[JaxprEqn] = []  # the products that would be worth it
        self.chosen: list[JaxprEqn] | None = None  # once they are chosen
        self.made = {v: equation for equation in program.eqns for v in equation.outvars}
        used = [*(v for equation in program.eqns for v in equation.invars), *program.outvars]
        self.used = Counter(v for v in used if isinstance(v, Var))

    def parts(self, v: Any, dtype: Any) -> list[Any]:
        """What to add up in place of `v`, all of it of that dtype: `v` itself, where there is no product in it."""
        found = self._terms(v, dtype, [])
        return found if any(isinstance(part, Product) for part in found) else [Dense([v])]

    def _terms(self, v: Any, dtype: Any, turns: list[JaxprEqn]) -> list[Any]:
        made = self.made.get(v) if isinstance(v, Var) and self.used[v] == 1 and _aval(v).dtype == dtype else None
        if made is None:
            return [Dense([v])]
        if made.primitive is primitives.add_jaxvals_p and not turns:
            return [part for side in made.invars for part in self.parts(side, dtype)]
        if made.primitive in (primitives.transpose_p, primitives.reshape_p):
            return self._terms(made.invars[0], dtype, [made, *turns])
        if made.primitive is primitives.dot_general_p and self._is_kept(made, dtype):
            return [Product(list(made.invars), made, turns)]
        return [Dense([v])]

    def _is_kept(self, dot: JaxprEqn, dtype: Any) -> bool:
        _, over = dot.params["dimension_numbers"]
        if over != ((), ()) or any(_aval(side).dtype != dtype for side in dot.invars):
            return False
        if self.chosen is not None:
            return any(dot is one for one in self.chosen)
        factors, product = _bytes(dot.invars), _bytes(dot.outvars)
        if SMALL * factors > product or SMALLER * self.count * factors > product:
            return False
        self.seen.append(dot)
        return True


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
