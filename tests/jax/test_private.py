"""What this package takes from JAX, optax and Flax that they do not promise: it is there, and does what we rely on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun, jaxprs_in_params, primitives
from jax.sharding import PartitionSpec as P

from bigbatch.engines import jax_estimate
from bigbatch.fused import jax_factors


def equations(function, *args):
    return jax.make_jaxpr(function)(*args).jaxpr.eqns


def test_an_array_tells_whether_it_is_ready():
    """`jax.checks.known_value`: items are read where that needs no waiting."""
    x = jnp.ones(())
    assert x.block_until_ready().is_ready() is True
    assert x.is_fully_addressable


def test_a_value_tells_along_which_axes_it_differs():
    """`jax.distributed._varying`: parameters that differ along an axis are refused."""
    seen = []
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def note(x, whole):
        seen.extend(jax.typeof(value).manual_axis_type.varying for value in (x, whole))
        return x

    jax.shard_map(note, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(jnp.ones(2), jnp.ones(()))
    assert seen == [{"data"}, frozenset()]


def test_a_type_tells_how_an_array_lies_on_explicit_axes():
    """`jax.batch._spec` and `jax.distributed._spec`."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        assert tuple(jax.typeof(jax.device_put(jnp.ones((2, 3)), P("data"))).sharding.spec) == ("data", None)
    assert all(entry is None for entry in jax.typeof(jnp.ones((2, 3))).sharding.spec)


def test_an_axis_without_a_name_is_a_name_error():
    """`jax.distributed.are_bound`."""
    with pytest.raises(NameError):
        lax.axis_size("nobody")


def test_the_compiler_tells_what_a_program_takes():
    """`engines.jax_estimate.needs_of`: these fields, and temporaries that the peak leaves out on a CPU."""
    used = jax.jit(lambda x: (jnp.sort(x) @ jnp.sort(x).T).sum()).lower(jnp.ones((64, 64))).compile().memory_analysis()
    assert used.output_size_in_bytes >= 4
    assert used.temp_size_in_bytes > 0
    assert used.alias_size_in_bytes == 0
    assert jax.local_devices()[0].memory_stats() is None  # of a CPU


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_an_out_of_memory_is_told_by_the_same_text_where_it_is_waited_for(kind):
    """`engines.jax_estimate.is_out_of_memory`: `block_until_ready` of several results raises a ValueError."""

    def fail(x):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

    @jax.jit
    def broken(x):
        return [jax.pure_callback(fail, jax.ShapeDtypeStruct((), x.dtype), x + k) for k in range(2)]

    def wait():
        results = broken(jnp.ones(()))
        jax.block_until_ready(results if kind is ValueError else results[0])

    with pytest.raises((ValueError, RuntimeError)) as caught:
        wait()
    assert jax_estimate.is_out_of_memory(caught.value)


def test_the_states_of_what_evaluates_the_loss_by_itself():
    """`jax.checks.refuse_line_search` knows them by these types."""
    p = {"w": jnp.ones(2)}
    states = {
        optax.ScaleByZoomLinesearchState: optax.scale_by_zoom_linesearch(5).init(p),
        optax.ScaleByBacktrackingLinesearchState: optax.scale_by_backtracking_linesearch(5).init(p),
        optax.contrib.HutchinsonState: optax.contrib.hutchinson_estimator_diag_hessian().init(p),
    }
    for kind, state in states.items():
        assert isinstance(state, kind)


def test_an_argument_that_a_function_does_not_know_is_named_in_the_error():
    """`jax.accumulation._Inner.shapes` leaves it out: optax.contrib.sam takes neither items nor value."""
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)
    p = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match="unexpected keyword argument 'items'"):
        sam.update(p, sam.init(p), p, items=1)


def test_a_module_in_an_optimizer_is_of_nnx_variables():
    """`jax.checks._is_of_nnx` finds them."""
    optimizer = nnx.Optimizer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param)
    leaves = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert any(isinstance(leaf, nnx.Variable) for leaf in leaves)


def test_an_equation_is_bound_again_with_its_own_parameters():
    """`fused.jax_factors._evaluated`, also of what holds functions."""

    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    sine.defjvps(lambda g, y, x: g * jnp.cos(x))
    (equation,) = equations(sine, 1.0)
    assert isinstance(equation, JaxprEqn)
    bound = equation.primitive.bind(1.0, **equation.primitive.get_bind_params(equation.params))
    np.testing.assert_allclose(bound, [np.sin(1.0)])


def test_the_program_of_a_gradient():
    """`fused.jax_factors`: these primitives, and these parameters of theirs."""
    w, x = jnp.ones((2, 3)), jnp.ones((4, 2))
    program = jax.make_jaxpr(jax.grad(lambda w: ((x @ w) * (x @ w)).sum()))(w)
    assert isinstance(program, ClosedJaxpr)
    assert isinstance(program.jaxpr, Jaxpr)
    kinds = {equation.primitive for equation in program.jaxpr.eqns}
    assert {primitives.dot_general_p, primitives.transpose_p, primitives.add_jaxvals_p} <= kinds
    dot = next(e for e in program.jaxpr.eqns if e.primitive is primitives.dot_general_p)
    assert dot.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    assert all(isinstance(v, Var) and v.aval.shape for v in dot.invars)
    outs = jaxpr_as_fun(program.replace(jaxpr=program.jaxpr.replace(outvars=program.jaxpr.outvars)))(w)
    np.testing.assert_allclose(outs[0], 2 * x.T @ (x @ w))
    (reshape,) = equations(lambda x: x.reshape(-1), x)
    assert reshape.primitive is primitives.reshape_p
    (call,) = equations(jax.jit(jnp.sin), 1.0)
    assert call.primitive is primitives.jit_p
    assert jaxprs_in_params(call.params)


def test_the_program_of_a_tables_gradient():
    """`fused.jax_factors.Reader`: a scatter-add to a broadcast zero."""
    table, ids = jnp.ones((5, 2)), jnp.asarray([1, 3])
    program = jax_factors.inlined(jax.make_jaxpr(jax.grad(lambda t: (t[ids] ** 2).sum()))(table))
    (scatter,) = (e for e in program.jaxpr.eqns if e.primitive is lax.scatter_add_p)
    zeros = next(e for e in program.jaxpr.eqns if scatter.invars[0] in e.outvars)
    assert zeros.primitive is lax.broadcast_in_dim_p
    assert isinstance(zeros.invars[0], Literal)
    assert zeros.invars[0].val == 0


def test_a_convolution_says_which_axis_is_which():
    """`fused.jax_conv_layout`."""
    layout = ("NHWC", "HWIO", "NHWC")
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2))
    program = jax.make_jaxpr(
        lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=layout)
    )(x, kernel)  # fmt: skip
    (equation,) = program.jaxpr.eqns
    assert equation.primitive is lax.conv_general_dilated_p
    assert equation.params["dimension_numbers"] == lax.conv_dimension_numbers(x.shape, kernel.shape, layout)
    assert equation.replace(params=equation.params).invars == equation.invars
