"""Split with Equinox: the arrays are differentiated, the rest of the module is bound, its state is carried on.

python examples/jax_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import bigbatch.jax as bb

pixels, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(pixels[:1024] / 16, jnp.float32), jnp.asarray(labels[:1024])


class Model(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    second: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.first, self.second = eqx.nn.Linear(64, 128, key=first), eqx.nn.Linear(128, 10, key=second)
        self.norm = eqx.nn.BatchNorm(128, axis_name="batch", mode="batch")

    def __call__(self, x, state):
        h, state = self.norm(self.first(x), state)
        return self.second(jnp.tanh(h)), state


model, state = eqx.nn.make_with_state(Model)(jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)
tx = optax.adamw(1e-2)
opt_state = tx.init(params)


def loss_fn(params, state, x, y):
    model = eqx.combine(params, static)
    logits, state = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


value_and_grad = bb.value_and_grad(loss_fn, has_aux=True, micro_batch=32, in_axes=(None, None, 0, 0), aux=bb.carry(1))


@jax.jit
def step(params, state, opt_state, x, y):
    (loss, state), grads = value_and_grad(params, state, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state, loss


for update in range(20):
    params, state, opt_state, loss = step(params, state, opt_state, x, y)
    print(f"update {update:2d}  loss {loss:.4f}")
