"""JAX's documented flow with its types. Type checkers read this file, and nothing runs it."""

from typing import assert_type

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

import bigbatch.jax as bb

Params = dict[str, jax.Array]
x, y = jnp.ones((100, 8)), jnp.ones((100, 2))
params: Params = {"w": jnp.zeros((8, 2))}


def loss_fn(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.square(batch[0] @ params["w"] - batch[1]).mean()


loss, grads = bb.value_and_grad(loss_fn, micro_batch=32, aux="mean")(params, (x, y))
bb.value_and_grad(loss_fn, micro_batch=32, has_aux=True, aux=(bb.carry(1), {"h": "concatenate"}))
bb.value_and_grad(loss_fn, micro_batch=32, aux="average")  # type: ignore[arg-type]  # a rule that there is not

tx = bb.accumulate(optax.adamw(1e-3), every=4)
state = tx.init(params)
assert_type(state, bb.AccumulateState)


@jax.jit
def step(params: Params, state: bb.AccumulateState, x: jax.Array, y: jax.Array) -> tuple[Params, bb.AccumulateState]:
    loss, grads = jax.value_and_grad(loss_fn)(params, (x, y))
    return bb.apply_gradients(tx, grads, state, params, items=len(x), value=loss)


assert_type(tx.update(grads, state, params, items=len(x))[1], bb.AccumulateState)
assert_type(bb.apply_gradients(tx, grads, state, params, items=len(x)), tuple[Params, bb.AccumulateState])
assert_type(bb.flush(tx, state, params), tuple[Params, bb.AccumulateState])
assert_type(state.micro_batches, jax.Array)
assert_type(state.last.reason, str | None)
print(step(params, state, x, y), bb.has_updated(state), bb.reset(state), optax.chain(optax.clip(1.0), tx).init(params))
bb.accumulate(optax.adamw(1e-3), every=lambda update: jnp.minimum(64, 4 + update // 100))
