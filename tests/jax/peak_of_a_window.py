"""Prints what a window was predicted to need, and what the process then grew by.

python peak_of_a_window.py mlp|transformer|convnet MICRO_BATCH MICRO_BATCHES
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

import bigbatch.jax as bb
from bigbatch.engines.jax_estimate import needs_of

sys.path.append(str(Path(__file__).parents[1]))  # appended: folders there have the frameworks' names
from process_memory import growth


def mlp(params, batch):
    x, y = batch
    for w in params[:-1]:
        x = jax.nn.gelu(x @ w)
    return _cross_entropy(x @ params[-1], y)


def transformer(params, batch):
    x, y = batch
    x = params["embedding"][x]
    for layer in params["layers"]:
        h = _normalized(x)
        q, k, v = (jnp.reshape(h @ layer[n], (*h.shape[:2], 4, 32)) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k) / 32**0.5)
        x = x + jnp.reshape(jnp.einsum("bhij,bjhd->bihd", weights, v), h.shape) @ layer["o"]
        x = x + jax.nn.relu(_normalized(x) @ layer["up"]) @ layer["down"]
    return _cross_entropy(x @ params["embedding"].T, y)


def convnet(params, batch):
    x, y = batch
    for w in params[:-1]:
        x = jax.nn.gelu(lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return _cross_entropy(x.mean((1, 2)) @ params[-1], y)


def _normalized(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def _cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()


def job(name, length):
    """A loss function, its parameters and a batch."""
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def weight(*shape):
        return jax.random.normal(next(keys), shape) / shape[-2] ** 0.5

    if name == "mlp":
        params = [weight(784, 1024), weight(1024, 1024), weight(1024, 10)]
        return mlp, params, (weight(length, 784), jnp.zeros(length, int))
    if name == "transformer":
        shapes = {**dict.fromkeys("qkvo", (128, 128)), "up": (128, 512), "down": (512, 128)}
        layers = [{n: weight(*shape) for n, shape in shapes.items()} for _ in range(3)]
        tokens = jax.random.randint(next(keys), (length, 64), 0, 1000)
        return transformer, {"embedding": weight(1000, 128), "layers": layers}, (tokens, tokens)
    params = [weight(3, 3, 3, 16), weight(1, 1, 16, 16), weight(16, 10)]
    return convnet, params, (weight(length, 32, 32, 3), jnp.zeros(length, int))


def main(name, micro_batch, micro_batches):
    loss_fn, params, batch = job(name, micro_batch * micro_batches)
    traced = jax.jit(bb.value_and_grad(loss_fn, micro_batch=micro_batch)).trace(params, batch)
    needs, program = needs_of(traced), traced.lower().compile()
    jax.block_until_ready((params, batch))
    print(needs, growth(lambda: jax.block_until_ready(program(params, batch))))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
