"""Convolutions in the loop over micro-batches: written the one way that is fast on a CPU, and the same numbers."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.core import jaxprs_in_params

import bigbatch.jax as bb
from bigbatch.fused.jax_conv_layout import with_fast_convolutions

FAST = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def convolutions(jaxpr):
    """The dimension numbers of all convolutions, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive is lax.conv_general_dilated_p:
            yield equation.params["dimension_numbers"]
        for inner in jaxprs_in_params(equation.params):
            yield from convolutions(inner)


LAYOUTS = [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NCHW", "HWIO", "NHWC")]


def problem(layout, **options):
    key = jax.random.split(jax.random.key(0), 3)
    sizes = {"N": 6, "H": 9, "W": 7, "C": 4, "I": 4 // options.get("feature_group_count", 1), "O": 8}
    x = jax.random.normal(key[0], [sizes[axis] for axis in layout[0]], jnp.float64)
    kernel = jax.random.normal(key[1], [{**sizes, "H": 3, "W": 2}[axis] for axis in layout[1]], jnp.float64)

    def loss_fn(kernel, x):
        y = lax.conv_general_dilated(x, kernel, **{"padding": "SAME", "window_strides": (1, 1), **options},
                                     dimension_numbers=layout)  # fmt: skip
        return jnp.sin(y).mean()

    return loss_fn, kernel, x


OPTIONS = [
    {}, {"window_strides": (2, 3)}, {"rhs_dilation": (2, 1)}, {"lhs_dilation": (1, 2), "padding": ((1, 1), (0, 2))},
    {"feature_group_count": 2}, {"padding": ((2, 0), (1, 1))},
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "options"), [*((LAYOUTS[0], options) for options in OPTIONS), *((other, {}) for other in LAYOUTS[1:])]
)
def test_the_gradients_are_the_same(layout, options):
    loss_fn, kernel, x = problem(layout, **options)
    plain = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))
    ours = jax.jit(with_fast_convolutions(jax.value_and_grad(loss_fn, (0, 1))))
    for a, b in zip(jax.tree.leaves(plain(kernel, x)), jax.tree.leaves(ours(kernel, x)), strict=True):
        assert a.shape == b.shape
        assert jnp.abs(a - b).max() <= 1e-13 * jnp.abs(a).max()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_none_is_left_that_is_slow_in_a_loop(checkpointed):
    loss_fn, kernel, x = problem(("NHWC", "HWIO", "NHWC"))
    body = jax.value_and_grad(jax.checkpoint(loss_fn) if checkpointed else loss_fn)
    before = set(convolutions(jax.make_jaxpr(body)(kernel, x).jaxpr))
    after = set(convolutions(jax.make_jaxpr(with_fast_convolutions(body))(kernel, x).jaxpr))
    assert before != {FAST}
    assert after == {FAST}


def test_the_door_loops_over_fast_ones():
    loss_fn, kernel, x = problem(("NCHW", "OIHW", "NCHW"))
    split = bb.value_and_grad(loss_fn, micro_batch=2)
    assert set(convolutions(jax.make_jaxpr(split)(kernel, x).jaxpr)) == {FAST}
    loss, grads = split(kernel, x)
    wanted, whole = jax.value_and_grad(loss_fn)(kernel, x)
    assert abs(loss - wanted) <= 1e-14 * abs(wanted)
    assert jnp.abs(grads - whole).max() <= 1e-13 * jnp.abs(whole).max()


def test_a_body_without_any_is_left_as_it_is():
    def body(carry, x):
        return carry + x, jnp.tanh(x)

    fast = with_fast_convolutions(body)
    assert str(jax.make_jaxpr(fast)(1.0, 2.0)) == str(jax.make_jaxpr(body)(1.0, 2.0))
