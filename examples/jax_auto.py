"""Batches of 1,024 on whatever memory there is: `micro_batch="auto"` plans by itself, and `bb.plan` shows its reasons.

python examples/jax_auto.py
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
keys = jax.random.split(jax.random.key(0))
params = [jax.random.normal(key, shape) / 8 for key, shape in zip(keys, [(64, 128), (128, 10)], strict=True)]
tx = optax.adamw(1e-2)
opt_state = tx.init(params)


def loss_fn(params, batch):
    x, y = batch
    logits = jnp.tanh(x @ params[0]) @ params[1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


batch = pixels[:1024], labels[:1024]
plan = bb.plan(loss_fn)(params, batch)
plan.show()
half = plan.needs / plan.budget.headroom / 2  # as if half of what the batch needs were free
bb.plan(loss_fn, memory=half)(params, batch).show()
value_and_grad = bb.value_and_grad(loss_fn, micro_batch="auto")


@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, opt_state, batch):
    loss, grads = value_and_grad(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


for epoch in range(20):
    rows = rng.permutation(len(labels))
    for part in (rows[:1024], rows[1024:]):
        params, opt_state, loss = step(params, opt_state, (pixels[part], labels[part]))
    print(f"epoch {epoch:2d}  loss {loss:.4f}")
