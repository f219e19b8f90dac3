"""Two towers: each picture's upper half finds its lower half among all of the batch, with 32 pairs in memory at a time.

The contrastive loss compares every pair with every other. So no sum over micro-batches is its gradient. `chunked` gives
it that of the whole batch. The rows of the matrix of all pairs are in pieces too.

python examples/jax_clip.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bigbatch.jax as bb

pixels, _ = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)
rng = np.random.default_rng(0)


def tower(key):
    one, two = jax.random.split(key)
    return {"in": jax.random.normal(one, (32, 256)) / 6, "out": jax.random.normal(two, (256, 32)) / 16}


def encode(params, x):
    y = jax.nn.gelu(x @ params["in"]) @ params["out"]
    return y / jnp.linalg.norm(y, axis=1, keepdims=True)


def row_loss(a, place, b, scale):
    """Of each row of the matrix of all pairs."""
    return optax.softmax_cross_entropy_with_integer_labels(jnp.exp(scale) * a @ b.T, place)


encoded = bb.chunked(encode, micro_batch=32)  # in_axes=(None, 0): parameters whole, examples in pieces
rows = bb.chunked(row_loss, micro_batch=64, in_axes=(0, 0, None, None))


def loss_fn(params, upper, lower):
    a, b = encoded(params["upper"], upper), encoded(params["lower"], lower)
    places = jnp.arange(len(a))
    return (rows(a, places, b, params["scale"]).mean() + rows(b, places, a, params["scale"]).mean()) / 2


upper_key, lower_key = jax.random.split(jax.random.key(0))
params = {"upper": tower(upper_key), "lower": tower(lower_key), "scale": jnp.array(2.0)}
tx = optax.adamw(3e-3)
opt_state, loss = tx.init(params), 0.0


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch[:, :32], batch[:, 32:])
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


for epoch in range(20):
    for part in rng.permutation(len(pixels))[:1536].reshape(3, 512):
        params, opt_state, loss = step(params, opt_state, pixels[part])
    print(f"epoch {epoch:2d}  loss {loss:.4f}")
