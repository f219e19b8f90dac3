"""`chunked`: the values and gradients of the function itself, for losses that compare all examples of a batch."""

import functools
import importlib
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.engines.tensorflow_estimate import peak
from bigbatch.host import Memory

file = importlib.import_module("bigbatch.tensorflow.chunked")  # the package has its function under this name
N = 11
F64 = tf.float64


class Encoder(tf.Module):
    def __init__(self, seed):
        super().__init__()
        normal = functools.partial(tf.random.stateless_normal, dtype=F64)
        self.a = tf.Variable(normal([5, 7], [seed, 1]))
        self.b = tf.Variable(normal([7, 3], [seed, 2]))

    def __call__(self, x):
        return tf.tanh(x @ self.a) @ self.b


@pytest.fixture
def towers():
    """Two encoders, a learned temperature, and a batch of pairs."""
    x, y = tf.unstack(tf.random.stateless_normal([2, N, 5], [0, 1], dtype=F64))
    return Encoder(0), Encoder(1), tf.Variable(tf.constant(0.3, F64)), x, y


def normalized(x):
    return x / tf.norm(x, axis=1, keepdims=True)


def places(a):
    return tf.range(tf.shape(a)[0])


def info_nce(a, b, scale):
    logits = tf.exp(scale) * normalized(a) @ tf.transpose(normalized(b))
    both = [tf.nn.sparse_softmax_cross_entropy_with_logits(places(a), one) for one in (logits, tf.transpose(logits))]
    return tf.reduce_mean(both)


def siglip(a, b, scale):
    signs = 2 * tf.one_hot(places(a), tf.shape(a)[0], dtype=a.dtype) - 1
    logits = tf.exp(scale) * normalized(a) @ tf.transpose(normalized(b)) - 1
    return tf.reduce_mean(tf.nn.softplus(-signs * logits))


def supervised(a, b, scale):
    own = tf.one_hot(places(a), tf.shape(a)[0], dtype=a.dtype)
    labels = places(a) % 3
    same = tf.cast(labels[:, None] == labels, a.dtype) - own
    logits = tf.exp(scale) * normalized(a) @ tf.transpose(normalized(a)) - 1e9 * own
    rows = tf.reduce_sum(same * tf.nn.log_softmax(logits), 1) / tf.reduce_sum(same, 1)
    return tf.reduce_mean(b**2) - tf.reduce_mean(rows)


def triplet(a, b, scale):
    distances = tf.reduce_sum((a[:, None] - b) ** 2, -1)
    own = tf.one_hot(places(a), tf.shape(a)[0], dtype=a.dtype)
    hardest = tf.reduce_min(distances + 1e9 * own, 1)
    return tf.reduce_mean(tf.nn.softplus(tf.linalg.diag_part(distances) - hardest + scale))


def barlow(a, b, scale):
    a, b = ((x - tf.reduce_mean(x, 0)) / tf.math.reduce_std(x, 0) for x in (a, b))
    count = tf.cast(tf.shape(a)[0], a.dtype)
    return tf.reduce_sum((tf.exp(scale) * tf.transpose(a) @ b / count - tf.eye(3, dtype=a.dtype)) ** 2)


def vicreg(a, b, scale):
    centred = a - tf.reduce_mean(a, 0)
    covariance = tf.transpose(centred) @ centred / (tf.cast(tf.shape(a)[0], a.dtype) - 1)
    off_diagonal = tf.linalg.set_diag(covariance, tf.zeros(3, a.dtype))
    spread = tf.reduce_mean(tf.nn.relu(1 - tf.math.reduce_std(a, 0))) + tf.exp(scale) * tf.reduce_sum(off_diagonal**2)
    return tf.reduce_mean((a - b) ** 2) + spread


def ranking(a, b, scale):
    scores, order = tf.reduce_sum(a * b, 1), tf.cast(places(a), a.dtype)
    return tf.reduce_mean(tf.nn.softplus((scores - scores[:, None]) * tf.sign(order[:, None] - order) * scale))


LOSSES = [info_nce, siglip, supervised, triplet, barlow, vicreg, ranking]


def gradients(loss, towers, change, tied=False, graph=False, jit_compile=None):
    """The loss and all gradients, with each encoder as `change` makes it."""
    a, b, scale, x, y = towers
    f, g = change(a), change(a if tied else b)

    def run(x, y):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(f(x), g(y), scale)
        sources = [a.a, a.b, scale, x] + ([] if tied else [b.a, b.b])
        return [value, *tape.gradient(value, sources)]

    return (tf.function(run, jit_compile=jit_compile) if graph else run)(x, y)


def agree(got, right, relative=1e-12):
    for g, r in zip(got, right, strict=True):
        g, r = (np.asarray(tf.convert_to_tensor(v)) for v in (g, r))
        np.testing.assert_allclose(g, r, rtol=0, atol=relative * max(1e-3, float(np.abs(r).max())))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_full_batchs_gradient(loss, tied, graph, towers):
    right = gradients(loss, towers, lambda model: model, tied)
    agree(gradients(loss, towers, lambda model: bb.chunked(model, micro_batch=4), tied, graph), right)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("micro_batch", "keep"), [(1, 0), (3, 1), (3, 2), (4, 20), (10, 1), (11, 0), (50, 3)])
def test_any_cut_and_any_number_of_kept_pieces(micro_batch, keep, graph, towers):
    right = gradients(info_nce, towers, lambda model: model)
    ours = lambda model: bb.chunked(model, micro_batch=micro_batch, keep=keep)  # noqa: E731
    agree(gradients(info_nce, towers, ours, graph=graph), right)
