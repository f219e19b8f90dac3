"""Split with Flax nnx: the module is taken apart, and what changes in a forward is carried on.

python examples/jax_nnx.py
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import bigbatch.jax as bb

pixels, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(pixels[:1024] / 16, jnp.float32), jnp.asarray(labels[:1024])


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(128, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return self.second(self.dropout(nnx.tanh(self.norm(self.first(x)))))


graph, params, state = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)  # state: the statistics, and dropout's keys
tx = optax.adamw(1e-2)
opt_state = tx.init(params)


def loss_fn(params, state, x, y):
    model = nnx.merge(graph, params, state, copy=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
    return loss, nnx.split(model, nnx.Param, ...)[2]


value_and_grad = bb.value_and_grad(loss_fn, has_aux=True, micro_batch=32, in_axes=(None, None, 0, 0), aux=bb.carry(1))


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def step(params, state, opt_state, x, y):
    (loss, state), grads = value_and_grad(params, state, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state, loss


for update in range(20):
    params, state, opt_state, loss = step(params, state, opt_state, x, y)
    print(f"update {update:2d}  loss {loss:.4f}")
