"""The jobs of TensorFlow 1's bench, in graphs: the same as `torch_jobs`, in the words of `tf.compat.v1`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1
WORDS, WIDTH, DEPTH, LENGTH, HEADS = 32_000, 256, 2, 64, 4


@dataclass(frozen=True)
class Job:
    """One window: `micro_batches` micro-batches of `size` examples."""

    title: str
    loss: Callable[[], tuple[Any, Any, Any]]  # placeholders for x and y, and the mean loss
    example: Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
    size: int
    micro_batches: int
    optimizer: Callable[[], Any] = lambda: v1.train.AdamOptimizer(1e-3)

    def parts(self) -> list[tuple[np.ndarray, np.ndarray]]:
        draw = np.random.default_rng(0)
        return [self.example(draw, self.size) for _ in range(self.micro_batches)]


def cross_entropy(y, scores):
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=scores))


def weights(name, shape, fan_in):
    return v1.get_variable(name, shape, initializer=v1.random_normal_initializer(stddev=fan_in**-0.5, seed=0))


def constant(name, width, value=0.0):
    return v1.get_variable(name, [width], initializer=v1.constant_initializer(value))


def dense(name, x, n, m):
    return x @ weights(f"{name}/kernel", [n, m], n) + constant(f"{name}/bias", m)


def mlp(*widths):
    def loss():
        x, y = v1.placeholder(tf.float32, [None, 784]), v1.placeholder(tf.int64, [None])
        h = x
        for i, (n, m) in enumerate(zip((784, *widths), (*widths, 10), strict=True)):
            h = dense(f"dense{i}", tf.nn.relu(h) if i else h, n, m)
        return x, y, cross_entropy(y, h)

    return loss


def normalized(name, x, width):
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-5) * constant(f"{name}/scale", width, 1.0) + constant(name, width)


def transformer():
    """A small pre-norm language model with causal attention, whose table of words is used at both ends."""
    tokens, following = (v1.placeholder(tf.int32, [None, LENGTH]) for _ in range(2))
    words = weights("words", [WORDS, WIDTH], WIDTH)
    # Rows, so that every weight's gradient is a product of two matrices.
    x = tf.reshape(tf.gather(words, tokens) + weights("places", [LENGTH, WIDTH], WIDTH), [-1, WIDTH])
    unseen = tf.constant(np.triu(np.full([LENGTH, LENGTH], -1e9, "float32"), 1))
    for i in range(DEPTH):
        qkv = dense(f"qkv{i}", normalized(f"norm1{i}", x, WIDTH), WIDTH, 3 * WIDTH)
        q, k, v = tf.unstack(tf.reshape(qkv, [-1, LENGTH, 3, HEADS, WIDTH // HEADS]), axis=2)
        scores = tf.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5 + unseen
        seen = tf.einsum("bhqk,bkhd->bqhd", tf.nn.softmax(scores), v)
        x += dense(f"out{i}", tf.reshape(seen, [-1, WIDTH]), WIDTH, WIDTH)
        up = tf.nn.gelu(dense(f"up{i}", normalized(f"norm2{i}", x, WIDTH), WIDTH, 4 * WIDTH))
        x += dense(f"down{i}", up, 4 * WIDTH, WIDTH)
    scores = tf.matmul(normalized("norm", x, WIDTH), words, transpose_b=True)
    return tokens, following, cross_entropy(tf.reshape(following, [-1]), scores)


def convolutional():
    x, y = v1.placeholder(tf.float32, [None, 32, 32, 3]), v1.placeholder(tf.int64, [None])
    h = x
    for i, (n, m) in enumerate(((3, 32), (32, 64), (64, 128))):
        h = tf.nn.conv2d(h, weights(f"kernel{i}", [3, 3, n, m], 9 * n), 1, "SAME") + constant(f"bias{i}", m)
        groups = tf.reshape(h, [-1, 32 >> i, 32 >> i, 8, m // 8])
        mean, variance = tf.nn.moments(groups, [1, 2, 4], keepdims=True)
        h = tf.reshape((groups - mean) * tf.math.rsqrt(variance + 1e-5), tf.shape(h))
        h = tf.nn.relu(h * constant(f"scale{i}", m, 1.0) + constant(f"shift{i}", m))
        h = tf.nn.max_pool2d(h, 2, 2, "VALID")
    return x, y, cross_entropy(y, dense("dense", tf.reshape(h, [-1, 2048]), 2048, 10))


def digits(draw, n):
    return draw.normal(size=(n, 784)).astype("float32"), draw.integers(10, size=n)


def sentences(draw, n):
    tokens = draw.integers(WORDS, size=(n, LENGTH + 1)).astype("int32")
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def pictures(draw, n):
    return draw.normal(size=(n, 32, 32, 3)).astype("float32"), draw.integers(10, size=n)


def sgd():
    return v1.train.GradientDescentOptimizer(1e-2)


BIG, MLP = mlp(1024, 1024), "MLP 784-1024-1024-10"
LANGUAGE = f"a transformer language model, {WORDS:,} words, width {WIDTH}, {DEPTH} blocks, {LENGTH} tokens a sentence"
JOBS = {
    "mlp-1": Job(f"{MLP}, micro-batch 1, Adam", BIG, digits, 1, 16),
    "mlp-16": Job(f"{MLP}, micro-batch 16, Adam", BIG, digits, 16, 16),
    "mlp-128": Job(f"{MLP}, micro-batch 128, Adam", BIG, digits, 128, 16),
    "mlp-16-sgd": Job(f"{MLP}, micro-batch 16, SGD", BIG, digits, 16, 16, sgd),
    "tiny": Job("MLP 784-8-8-10, micro-batch 16, Adam", mlp(8, 8), digits, 16, 16),
    "transformer": Job(f"{LANGUAGE}, micro-batch 1, Adam", transformer, sentences, 1, 16),
    "convolutional": Job("3 convolutions on 32 × 32 pictures, micro-batch 8, Adam", convolutional, pictures, 8, 16),
}
