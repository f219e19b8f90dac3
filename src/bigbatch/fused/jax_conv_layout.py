"""Convolutions in a loop on a CPU, in the one layout in which XLA computes them fast there.

XLA's fast convolution on a CPU takes examples first and channels last, and kernels as height, width, in, out. Others
are transposed to that by a pass that looks into no loop (jax-ml/jax#12868 reports it of a forward): in a loop over
micro-batches they are ten times slower, and a layer's two gradients never have that layout.

It buys a factor of about ten for convolutional models: benchmarks/jax_window.md, "3 convolutions". It does nothing on
other devices than CPUs, and for models without convolutions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun


def with_fast_convolutions(body: Callable[..., Any]) -> Callable[..., Any]:
    """A loop's body whose convolutions are transposed to the fast layout; on other devices than CPUs the body itself.

    The body takes and returns pytrees. It is traced once more where there is nothing to change.
    """
    if jax.default_backend() != "cpu":
        return body

    @functools.wraps(body)
    def run(*args: Any) -> Any:
        traced, shapes = jax.make_jaxpr(body, return_shape=True)(*args)
        changed = fast(traced)
        if changed is traced:
            return body(*args)
        return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(changed)(*jax.tree.leaves(args)))

    return run


def fast(program: ClosedJaxpr) -> ClosedJaxpr:
    """The program with its convolutions transposed to the fast layout; itself where there are none to change."""
    return _changed(program) if jax.default_backend() == "cpu" else program


def _changed(value: Any) -> Any:
    """A program, or a parameter of an equation, which may hold programs; itself where nothing changes."""
    if isinstance(value, ClosedJaxpr) and value.jaxpr is not value:  # from JAX 0.11 on the two are one class
        inner = _changed(value.jaxpr)
        return value if inner is value.jaxpr else value.replace(jaxpr=inner)
    if isinstance(value, Jaxpr):
        equations = [new for equation in value.eqns for new in _equations(equation)]
        same = len(equations) == len(value.eqns) and all(map(lambda a, b: a is b, equations, value.eqns))
        return value if same else value.replace(eqns=equations)
    if type(value) is tuple:
        changed = tuple(map(_changed, value))
        return value if all(map(lambda a, b: a is b, changed, value)) else changed
    return value


def _equations(equation: Any) -> list[Any]:
    """The equations in place of one."""
    if equation.primitive is lax.conv_general_dilated_p and not _is_fast(equation.params["dimension_numbers"]):
        avals = [v.aval for v in equation.invars]
        inner = jax.make_jaxpr(lambda x, kernel: _transposed(x, kernel, equation.params))(*avals).jaxpr
        names = dict(zip([*inner.invars, *inner.outvars], [*equation.invars, *equation.outvars], strict=True))

        def named(variables: list[Any]) -> list[Any]:
            return [v if isinstance(v, Literal) else names.get(v, v) for v in variables]

        return [e.replace(invars=named(e.invars), outvars=named(e.outvars)) for e in inner.eqns]
    changed = {name: _changed(value) for name, value in equation.params.items()}
    same = all(changed[name] is value for name, value in equation.params.items())
    return [equation if same else equation.replace(params=changed)]


def _is_fast(numbers: lax.ConvDimensionNumbers) -> bool:
    return numbers == _fast(len(numbers.lhs_spec))


def _fast(rank: int) -> lax.ConvDimensionNumbers:
    """Examples, places, channels; places, in, out."""
    places = range(1, rank - 1)
    images = (0, rank - 1, *places)
    return lax.ConvDimensionNumbers(images, (rank - 1, rank - 2, *range(rank - 2)), images)


def _transposed(x: jax.Array, kernel: jax.Array, params: dict[str, Any]) -> jax.Array:
    """The same convolution, between transpositions."""
    own, fast = params["dimension_numbers"], _fast(x.ndim)

    def axes(to: Sequence[int], of: Sequence[int]) -> list[int]:
        """For each axis of `to`, that of `of` which means the same."""
        return [of[to.index(axis)] for axis in range(len(to))]

    x = jnp.transpose(x, axes(fast.lhs_spec, own.lhs_spec))
    kernel = jnp.transpose(kernel, axes(fast.rhs_spec, own.rhs_spec))
    y = lax.conv_general_dilated_p.bind(x, kernel, **{**params, "dimension_numbers": fast})
    return jnp.transpose(y, axes(own.out_spec, fast.out_spec))
