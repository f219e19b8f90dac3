"""Is accumulation exact for this loss, and is a larger batch worth it? JAX, on scikit-learn's digits.

python examples/jax_honest.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bigbatch.jax as bb

pixels, labels = load_digits(return_X_y=True)
x, y = np.asarray(pixels / 16, np.float32), np.asarray(labels)
keys = jax.random.split(jax.random.key(0))
params = {"a": jax.random.normal(keys[0], (64, 64)) / 8, "c": jax.random.normal(keys[1], (64, 10)) / 8}


def loss_fn(params, batch, norm=False):
    x, y = batch
    hidden = x @ params["a"]
    if norm:  # over the batch
        hidden = (hidden - hidden.mean(0)) / (hidden.std(0) + 1e-3)
    logits = jnp.tanh(hidden) @ params["c"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# Exact? With a normalization over the batch it is not.
for norm in (True, False):
    print(bb.audit(functools.partial(loss_fn, norm=norm), params, (x[:30], y[:30]), micro_batch=8), end="\n\n")


def train(every, epochs):
    """The sizes of the windows, and the optimizer's state at the end."""
    tx = bb.accumulate(optax.adamw(1e-3), every=every, noise=1)

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, items=len(batch[0]))
        return optax.apply_updates(params, updates), state

    now, state, sizes = params, tx.init(params), []
    for rows in np.random.default_rng(0).permuted(np.tile(np.arange(1792), (epochs, 1)), axis=1).reshape(-1, 16):
        now, state = step(now, state, (x[rows], y[rows]))
        if bb.has_updated(state):
            sizes.append(int(state.last.micro_batches))
    return sizes, state


# Worth it? 64 × 16 measures its own noise.
_, state = train(64, epochs=20)
print("noise scale:", bb.noise_scale(state))
print(bb.advice(bb.noise_scale(state), batch=1024, micro_batch=16, beta2=0.999))

# Windows that close when the gradient is known well enough, under jit.
sizes, _ = train(bb.until_noise(eta=1.0, at_most=64), epochs=2)
print("windows of", sizes)
