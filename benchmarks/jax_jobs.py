"""The three jobs of JAX's benchmarks, as pure functions: the same as `torch_jobs`, in JAX's words."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

ON_GPU = jax.default_backend() == "gpu"
ON = f"a GPU ({jax.devices()[0].device_kind})" if ON_GPU else "a CPU"

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Job:
    """One window: `micro_batches` micro-batches of `size` examples."""

    title: str
    parameters: Callable[[], Any]
    example: Callable[[int], tuple[jax.Array, jax.Array]]
    loss_fn: Callable[[Any, jax.Array, jax.Array], jax.Array]
    size: int
    micro_batches: int


def dense(key, n, m):
    return jax.random.normal(key, (n, m)) / n**0.5, jnp.zeros(m)


def apply(layer, x):
    return x @ layer[0] + layer[1]


def mlp_parameters():
    keys = jax.random.split(jax.random.key(0), 3)
    return [dense(key, n, m) for key, n, m in zip(keys, (784, 1024, 1024), (1024, 1024, 10), strict=True)]


def mlp_loss(params, x, y):
    for layer in params[:-1]:
        x = jax.nn.gelu(apply(layer, x))
    return cross_entropy(apply(params[-1], x), y).mean()


WORDS, WIDTH, DEPTH, LENGTH, HEADS = 32_000, 256, 2, 64, 4


def transformer_parameters():
    keys = iter(jax.random.split(jax.random.key(0), 2 + 4 * DEPTH))

    def norm():
        return {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}

    return {
        "words": jax.random.normal(next(keys), (WORDS, WIDTH)) / WIDTH**0.5,
        "places": jax.random.normal(next(keys), (LENGTH, WIDTH)) / WIDTH**0.5,
        "norm": norm(),
        "blocks": [
            {
                "norm1": norm(),
                "norm2": norm(),
                "qkv": dense(next(keys), WIDTH, 3 * WIDTH),
                "out": dense(next(keys), WIDTH, WIDTH),
                "up": dense(next(keys), WIDTH, 4 * WIDTH),
                "down": dense(next(keys), 4 * WIDTH, WIDTH),
            }
            for _ in range(DEPTH)
        ],
    }


def normalized(norm, x):
    return jax.nn.standardize(x, axis=-1, epsilon=1e-5) * norm["scale"] + norm["bias"]


def transformer_loss(params, tokens, following):
    x = params["words"][tokens] + params["places"][: tokens.shape[1]]
    for block in params["blocks"]:
        qkv = apply(block["qkv"], normalized(block["norm1"], x))
        q, k, v = (t.reshape(*t.shape[:2], HEADS, -1) for t in jnp.split(qkv, 3, axis=-1))
        x = x + apply(block["out"], jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        x = x + apply(block["down"], jax.nn.gelu(apply(block["up"], normalized(block["norm2"], x))))
    return cross_entropy(normalized(params["norm"], x) @ params["words"].T, following).mean()


CHANNELS = (3, 32, 64, 128)


def convolutional_parameters():
    keys = jax.random.split(jax.random.key(0), 4)
    kernels = [
        (jax.random.normal(key, (3, 3, n, m)) / (9 * n) ** 0.5, jnp.zeros(m), jnp.ones(m), jnp.zeros(m))
        for key, n, m in zip(keys, CHANNELS[:-1], CHANNELS[1:], strict=False)
    ]
    return {"kernels": kernels, "out": dense(keys[-1], 4 * 4 * CHANNELS[-1], 10)}


def convolutional_loss(params, x, y):
    for kernel, bias, scale, shift in params["kernels"]:
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + bias
        groups = x.reshape(*x.shape[:3], 8, -1)
        x = jax.nn.standardize(groups, axis=(1, 2, 4), epsilon=1e-5).reshape(x.shape) * scale + shift
        x = jax.nn.relu(x).reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).max((2, 4))
    return cross_entropy(apply(params["out"], x.reshape(len(x), -1)), y).mean()


def digits(n):
    return jax.random.normal(jax.random.key(1), (n, 784)), jax.random.randint(jax.random.key(2), (n,), 0, 10)


def sentences(n):
    tokens = jax.random.randint(jax.random.key(1), (n, LENGTH + 1), 0, WORDS)
    return tokens[:, :-1], tokens[:, 1:]


def pictures(n):
    return jax.random.normal(jax.random.key(1), (n, 32, 32, 3)), jax.random.randint(jax.random.key(2), (n,), 0, 10)


LANGUAGE = f"a transformer language model, {WORDS:,} words, width {WIDTH}, {DEPTH} blocks, {LENGTH} tokens a sentence"
JOBS = {
    "mlp-1": Job("MLP 784-1024-1024-10, micro-batch 1", mlp_parameters, digits, mlp_loss, 1, 16),
    "mlp-16": Job("MLP 784-1024-1024-10, micro-batch 16", mlp_parameters, digits, mlp_loss, 16, 16),
    "mlp-32": Job("MLP 784-1024-1024-10, micro-batch 32", mlp_parameters, digits, mlp_loss, 32, 8),
    "mlp-128": Job("MLP 784-1024-1024-10, micro-batch 128", mlp_parameters, digits, mlp_loss, 128, 16),
    "transformer": Job(f"{LANGUAGE}, micro-batch 1", transformer_parameters, sentences, transformer_loss, 1, 16),
    "convolutional": Job(
        "3 convolutions on 32 × 32 pictures, micro-batch 8",
        convolutional_parameters,
        pictures,
        convolutional_loss,
        8,
        16,
    ),
}
