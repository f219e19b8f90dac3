"""Split: batches of 1,024 as they are, with the activations of 32 examples in memory at a time. Flax linen.

BatchNorm's statistics go from micro-batch to micro-batch, and each micro-batch draws its own dropout.

python examples/jax_split.py
"""

import functools

import flax.linen as nn
import jax
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


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(128)(x)))
        return nn.Dense(10)(nn.Dropout(0.1, deterministic=not train)(x))


model = Model()
variables = model.init(jax.random.key(0), pixels[:1], train=False)
params, batch_stats = variables["params"], variables["batch_stats"]
tx = optax.adamw(1e-2)
opt_state = tx.init(params)


def loss_fn(params, batch_stats, batch, key):
    x, y = batch
    variables = {"params": params, "batch_stats": batch_stats}
    logits, changed = model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (changed["batch_stats"], (logits.argmax(1) == y).sum())


value_and_grad = bb.value_and_grad(  # was: jax.value_and_grad(loss_fn, has_aux=True)
    loss_fn, has_aux=True, micro_batch=32, in_axes=(None, None, 0, None), aux=(bb.carry(1), "sum")
)


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def step(params, batch_stats, opt_state, batch, key):
    (loss, (batch_stats, right)), grads = value_and_grad(params, batch_stats, batch, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state, loss, right


key, loss = jax.random.key(1), 0.0
for epoch in range(20):
    right = 0
    for i, batch in enumerate(loader(1024)):
        drop = jax.random.fold_in(jax.random.fold_in(key, epoch), i)
        params, batch_stats, opt_state, loss, hits = step(params, batch_stats, opt_state, batch, drop)
        right += int(hits)
    print(f"epoch {epoch:2d}  {right} of {len(labels)} right  loss {loss:.4f}")
