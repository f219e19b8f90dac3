"""Stream: a loader yields micro-batches of 16, and every 64 of them make one update. Plain dicts and optax.

python examples/jax_stream.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bigbatch.jax as bb

pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype(np.float32)
rng = np.random.default_rng(0)


def loader(batch_size):
    rows = rng.permutation(len(labels))
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        yield pixels[part], labels[part]


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["w1"] + params["b1"])
    return optax.softmax_cross_entropy_with_integer_labels(h @ params["w2"] + params["b2"], y).mean()


params = {
    "w1": jnp.asarray(rng.normal(size=(64, 128), scale=1 / 8), jnp.float32),
    "b1": jnp.zeros(128),
    "w2": jnp.asarray(rng.normal(size=(128, 10), scale=0.1), jnp.float32),
    "b2": jnp.zeros(10),
}
schedule = optax.cosine_decay_schedule(1e-2, decay_steps=40)  # 40 updates, not 2,260 micro-batches
tx = bb.accumulate(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)), every=64)
opt_state = tx.init(params)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    return bb.apply_gradients(tx, grads, opt_state, params, items=len(x), value=loss)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def last_step(params, opt_state):
    updates, opt_state = bb.flush(tx, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def report(epoch, opt_state):
    last = opt_state.last
    print(f"epoch {epoch:2d}  update {opt_state.updates - 1:2d}  {last.items:.0f} examples  loss {last.loss:.4f}")


for epoch in range(20):
    for i, (x, y) in enumerate(loader(16), start=1):
        params, opt_state = step(params, opt_state, x, y)
        if i % 64 == 0:
            report(epoch, opt_state)
    params, opt_state = last_step(params, opt_state)  # the last 49 micro-batches are a window of their own
    report(epoch, opt_state)
