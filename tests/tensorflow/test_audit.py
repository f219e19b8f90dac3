"""`audit` in TensorFlow on losses whose truth is known, and what it leaves as it was."""

import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
import conformance.adapters.tensorflow  # noqa: F401 (makes two devices of one, before the first tensor)

ROOT = Path(__file__).parents[2]
rng = np.random.default_rng(0)
N, D, CLASSES = 14, 6, 4
A = tf.Variable(rng.normal(size=(D, 8)) / 2, name="a")
C = tf.Variable(rng.normal(size=(8, CLASSES)) / 2, name="c")
X, Y = tf.constant(rng.normal(size=(N, D))), tf.constant(rng.integers(CLASSES, size=N))
IDS = tf.constant(rng.integers(D, size=(N, 6)))
MASK = tf.constant((np.arange(6) < rng.integers(1, 7, size=(N, 1))).astype(np.float64))


def each(logits, labels):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def network(x):
    return tf.tanh(x @ A) @ C


def plain(batch):
    return tf.reduce_mean(each(network(batch[0]), batch[1]))


def token_mean(batch):
    ids, mask = batch
    losses = each(tf.tanh(tf.gather(A, ids)) @ C, ids % CLASSES)
    return tf.reduce_sum(losses * mask) / tf.reduce_sum(mask)


def batch_norm(batch):
    hidden = batch[0] @ A
    hidden = (hidden - tf.reduce_mean(hidden, 0)) / tf.math.reduce_std(hidden, 0)
    return tf.reduce_mean(each(tf.tanh(hidden) @ C, batch[1]))


def auxiliary(batch):
    return token_mean(batch) + tf.reduce_mean(
        tf.reduce_sum(tf.square(tf.reduce_mean(tf.gather(A, batch[0]), 1)), 1)
    )  # fmt: skip


def info_nce(batch):
    a = network(batch[0])
    return tf.reduce_mean(each(a @ tf.transpose(tf.roll(a, 1, 1)), tf.range(tf.shape(a)[0])))


PADDED = tf.concat([MASK[:4], tf.zeros((4, 6), tf.float64), MASK[8:]], 0)
ZOO = {
    "plain": (plain, (X, Y), True, []),
    "penalty": (lambda b: plain(b) + tf.reduce_sum(A**2), (X, Y), True, []),
    "tokens with items": (lambda b: (token_mean(b), tf.reduce_sum(b[1])), (IDS, MASK), True, []),
    "sum": (lambda b: tf.reduce_sum(each(network(b[0]), b[1])), (X, Y), False, ["sum"]),
    "constant": (lambda b: tf.reduce_sum(each(network(b[0]), b[1])) / 64, (X, Y), False, ["sum"]),
    "tokens without items": (token_mean, (IDS, MASK), False, ["items"]),
    "two denominators": (lambda b: (auxiliary(b), tf.reduce_sum(b[1])), (IDS, MASK), False, ["terms"]),
    "batch norm": (batch_norm, (X, Y), False, ["coupling"]),
    "info nce": (info_nce, (X, Y), False, ["coupling"]),
    "padding alone": (token_mean, (IDS, PADDED), False, ["not finite"]),
    "noise": (lambda b: plain((b[0] + tf.random.normal(b[0].shape, 0, 0.3, tf.float64), b[1])), (X, Y), True,
              ["stochastic"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name):
    loss_fn, batch, exact, causes = ZOO[name]
    found = bb.audit(loss_fn, batch, [A, C], micro_batch=4)
    assert found.exact == exact, found
    assert [cause.kind for cause in found.causes] == causes, found
    assert found.dtype == "float64"


def keras_model(*layers):
    model = tf.keras.Sequential([tf.keras.Input((D,)), *layers])
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, lambda b: loss(b[1], model(b[0], training=True))


@pytest.mark.parametrize(
    ("layer", "exact", "kinds"),
    [
        (tf.keras.layers.LayerNormalization, True, []),
        (tf.keras.layers.BatchNormalization, False, ["coupling"]),
        (lambda: tf.keras.layers.Dropout(0.3), True, ["stochastic"]),
    ],
    ids=["layer norm", "batch norm", "dropout"],
)
def test_keras_layers_are_left_as_they_were(layer, exact, kinds):
    tf.keras.utils.set_random_seed(0)
    model, loss_fn = keras_model(tf.keras.layers.Dense(8), layer(), tf.keras.layers.Dense(CLASSES))
    batch = tf.cast(X, tf.float32), Y

    def everything():
        chance = random.getstate(), np.random.get_state()[1].tolist()
        return [v.numpy().tolist() for v in [*model.variables, *model.non_trainable_variables]], chance

    for layer_ in model.layers:
        for generator in getattr(layer_, "_seed_generators", []):
            generator.state.assign([5, 7])
    tf.random.set_seed(3)
    wanted = [tf.random.normal([2]).numpy().tolist() for _ in range(2)]
    tf.random.set_seed(3)
    first, before = tf.random.normal([2]).numpy().tolist(), everything()
    found = bb.audit(loss_fn, batch, model.trainable_variables, micro_batch=4)
    assert everything() == before
    assert [first, tf.random.normal([2]).numpy().tolist()] == wanted
    assert (found.exact, [c.kind for c in found.causes], found.dtype) == (exact, kinds, "float32"), found


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"micro_batch": 0}, ValueError, "micro_batch must be at least 1"),
        ({"micro_batch": 14}, ValueError, "An audit needs more than one micro-batch"),
        ({"batch": (X, Y[:3])}, ValueError, "The leaves of a batch must have the same length"),
        ({"variables": []}, ValueError, "variables must hold at least one"),
        ({"loss_fn": lambda b: b[0]}, ValueError, "The loss must be a scalar of a floating type"),
        ({"loss_fn": lambda b: tf.reduce_sum(b[0])}, ValueError, "The loss needs no gradient"),
        ({"loss_fn": lambda b: (plain(b), -1)}, ValueError, "items must be positive"),
    ],
)
def test_bad_input(change, kind, words):
    given = {"loss_fn": plain, "batch": (X, Y), "variables": [A, C], "micro_batch": 4, **change}
    with pytest.raises(kind, match=words):
        bb.audit(given["loss_fn"], given["batch"], given["variables"], micro_batch=given["micro_batch"])


def test_the_example(capsys):
    runpy.run_path(str(ROOT / "examples/tensorflow_honest.py"))
    said = capsys.readouterr().out
    assert "not exact: " in said
    assert "\nexact to " in said
    assert "noise scale: " in said
    assert "windows of [" in said
