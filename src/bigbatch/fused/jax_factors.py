"""What the gradients of a traced program are made of: products of two factors, rows of a table, or nothing known.

A dense layer's weight gradient is leftᵀ · right, of the layer's inputs and its outputs' gradients: a factored gradient.
`Reader` finds such products in a program, and `bigbatch.fused.jax_deferred` sums them without making each.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun, primitives


class FactoredGrad(NamedTuple):
    """Part of a gradient: the product of two factors, transposed or reshaped."""

    inputs: list[Any]  # the factors: variables of the program, or arrays, stacked
    dot: JaxprEqn  # the `dot_general`
    layout: list[JaxprEqn]  # transpositions and reshapes of the product, in order

    def product(self) -> jax.Array:
        """Summed over all micro-batches, which the factors' first dimension counts: one matmul."""
        (left, right), (batch_left, batch_right) = self.dot.params["dimension_numbers"]
        shifted = [(0, *(axis + 1 for axis in axes)) for axes in (left, right)]
        numbers = (tuple(shifted), (batch_left, batch_right))
        value = lax.dot_general_p.bind(*self.inputs, **{**self.dot.params, "dimension_numbers": numbers})
        for change in self.layout:
            value = change.primitive.bind(value, **change.params)
        return value


class Cut(NamedTuple):
    """How a product of stacked factors is cut into pieces."""

    pieces: int
    side: int  # the factor that is cut
    axis: int  # its axis
    out: int  # the axis of the product that becomes of it, after the changes of layout


class PiecewiseGrad(NamedTuple):
    """Part of a gradient: a product that the loop adds to the sum piece by piece, once for a few micro-batches."""

    inputs: list[Any]  # as of `grad`
    grad: FactoredGrad
    cut: Cut

    def added_to(self, total: jax.Array) -> jax.Array:
        """The sum with this product in it."""
        pieces, side, axis, out = self.cut
        size = total.shape[out] // pieces

        def add(i: Any, total: jax.Array) -> jax.Array:
            inputs = list(self.inputs)
            inputs[side] = lax.dynamic_slice_in_dim(inputs[side], i * size, size, axis)
            piece = lax.dynamic_slice_in_dim(total, i * size, size, out)
            piece = piece + self.grad._replace(inputs=inputs).product()
            return lax.dynamic_update_slice_in_dim(total, piece, i * size, out)

        return lax.fori_loop(0, pieces, add, total)


class TableGrad(NamedTuple):
    """Part of a gradient: a `scatter-add` to zeros, as of the rows of a table that were looked up."""

    inputs: list[Any]  # the indices and the updates
    scatter: JaxprEqn

    def added_to(self, total: jax.Array) -> jax.Array:
        """The sum with these rows added in place: no array of the table's size is made."""
        return lax.scatter_add_p.bind(total, *self.inputs, **self.scatter.params)


class DenseGrad(NamedTuple):
    """Part of a gradient, as the program computes it."""

    inputs: list[Any]  # one variable, or its value


class Reader:
    """Finds the parts of a program's gradients."""

    def __init__(self, program: Jaxpr):
        self.equation_of = {v: equation for equation in program.eqns for v in equation.outvars}
        uses = [*(v for equation in program.eqns for v in equation.invars), *program.outvars]
        self.uses = Counter(v for v in uses if isinstance(v, Var))

    def parts(self, v: Any, dtype: Any, chosen: dict[int, Cut | None] | None) -> list[Any]:
        """The parts whose sum is the gradient `v`, all of this dtype; `v` as a whole where no part is better.

        Args:
            v: a variable of the program.
            dtype: of the sum.
            chosen: the products to factor, by the `id` of their equation, each with a cut or None; None for all.
        """
        parts = self._parts(v, dtype, [], chosen)
        return [DenseGrad([v])] if all(isinstance(part, DenseGrad) for part in parts) else parts

    def _parts(self, v: Any, dtype: Any, layout: list[JaxprEqn], chosen: dict[int, Cut | None] | None) -> list[Any]:
        is_read_once = isinstance(v, Var) and self.uses[v] == 1 and aval(v).dtype == dtype
        equation = self.equation_of.get(v) if is_read_once else None
        if equation is None:
            return [DenseGrad([v])]
        if equation.primitive is primitives.add_jaxvals_p and not layout:
            return [part for side in equation.invars for part in self.parts(side, dtype, chosen)]
        if equation.primitive in (primitives.transpose_p, primitives.reshape_p):
            return self._parts(equation.invars[0], dtype, [equation, *layout], chosen)
        is_chosen = chosen is None or id(equation) in chosen
        if equation.primitive is primitives.dot_general_p and is_chosen and _is_product(equation, dtype):
            grad, cut = FactoredGrad(list(equation.invars), equation, layout), chosen[id(equation)] if chosen else None
            return [grad if cut is None else PiecewiseGrad(grad.inputs, grad, cut)]
        if equation.primitive is lax.scatter_add_p and not layout and self.is_constant(equation.invars[0], 0):
            return [TableGrad(list(equation.invars[1:]), equation)]
        return [DenseGrad([v])]

    def is_constant(self, v: Any, value: Any = None) -> bool:
        """Whether a variable is one number everywhere (`value`, where given), an array that XLA does not make."""
        equation = self.equation_of.get(v) if isinstance(v, Var) else None
        if equation is None or equation.primitive is not lax.broadcast_in_dim_p:
            return False
        number = equation.invars[0]
        return isinstance(number, Literal) and (value is None or number.val == value)


def _is_product(dot: JaxprEqn, dtype: Any) -> bool:
    _, batch_axes = dot.params["dimension_numbers"]
    return batch_axes == ((), ()) and all(aval(side).dtype == dtype for side in dot.invars)


def aval(v: Any) -> Any:
    """A variable's shape and dtype."""
    return v.aval


def size_of(variables: Sequence[Any]) -> int:
    """The bytes that variables take."""
    return sum(v.aval.size * v.aval.dtype.itemsize for v in variables)


def with_outputs(program: ClosedJaxpr, variables: list[Any]) -> Any:
    """The program as a function that returns the values of these variables."""
    return jaxpr_as_fun(program.replace(jaxpr=program.jaxpr.replace(outvars=variables)))


def inlined(program: ClosedJaxpr) -> ClosedJaxpr:
    """The same program with the `jax.jit`s in it inlined, for a reader does not look into them."""

    def run(program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        values = dict(zip([*program.jaxpr.constvars, *program.jaxpr.invars], [*program.consts, *args], strict=True))

        def read(v: Any) -> Any:
            return v.val if isinstance(v, Literal) else values[v]

        for equation in program.jaxpr.eqns:
            inputs = list(map(read, equation.invars))
            if equation.primitive is primitives.jit_p:
                outputs = run(equation.params["jaxpr"], inputs)
            else:
                outputs = _evaluated(equation, inputs)
            values.update(zip(equation.outvars, outputs, strict=True))
        return list(map(read, program.jaxpr.outvars))

    return jax.make_jaxpr(lambda *args: run(program, args))(*(v.aval for v in program.jaxpr.invars))


def _evaluated(equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
    # `get_bind_params` is not public; tests/jax/test_private.py.
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before JAX 0.10
    outputs = equation.primitive.bind(*functions, *inputs, **params)
    return outputs if equation.primitive.multiple_results else [outputs]
