"""With jit_compile=True: what XLA cannot do is done another way, or said."""

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb


@pytest.mark.parametrize("door", ["split", "stream"])
def test_a_sparse_gradient_is_made_dense(door):
    table = tf.Variable(tf.ones([5, 2]))
    ids = tf.constant([1, 1, 4, 0, 1])
    optimizer = tf.keras.optimizers.SGD(1.0)
    acc = bb.Accumulator(optimizer, every=1)

    def loss_fn(ids):
        return tf.reduce_mean(tf.gather(table, ids) ** 2)

    @tf.function(jit_compile=True)
    def step(ids):
        if door == "split":
            _, gradients = bb.value_and_grad(loss_fn, ids, [table], micro_batch=2)
            optimizer.apply_gradients(zip(gradients, [table], strict=True))
        else:
            with tf.GradientTape() as tape:
                loss = loss_fn(ids)
            acc.apply_gradients([(tape.gradient(loss, table), table)], items=5)

    step(ids)
    np.testing.assert_allclose(table, 1 - np.bincount(ids, minlength=5)[:, None] / 5 * [1, 1], rtol=1e-6)


def test_a_window_without_items_is_skipped_for_nothing_can_be_raised():
    w = tf.Variable([1.0])
    acc = bb.Accumulator(tf.keras.optimizers.SGD(1.0), every=2)
    step = tf.function(lambda n: acc.apply_gradients([(tf.ones([1]), w)], items=n), jit_compile=True)
    for _ in range(2):
        update = step(tf.constant(0))
    assert not bool(update.made)
    assert update.skipped
    for n in (1, 3):
        update = step(tf.constant(n))
    assert bool(update.made)
    np.testing.assert_array_equal(w, [0.0])


def test_dropout_draws_anew_in_each_micro_batch():
    w = tf.Variable(tf.zeros([64]))
    noise = tf.random.Generator.from_seed(1)

    def loss_fn(x):
        return tf.reduce_mean(tf.linalg.matvec(tf.where(noise.uniform(tf.shape(x)) < 0.5, 2 * x, 0), w))

    step = tf.function(lambda x: bb.value_and_grad(loss_fn, x, [w], micro_batch=1)[1][0], jit_compile=True)
    drawn = step(tf.ones([2, 64]))
    assert set(drawn.numpy()) == {0.0, 1.0, 2.0}, "two masks alike would give 0 and 2 only"


def test_an_open_window_copies_no_variable():
    """What a conditional leaves as it is, XLA copies: the weights, and all that the optimizer holds."""
    w = tf.Variable(tf.ones([77, 33]))
    optimizer = tf.keras.optimizers.Adam()
    acc = bb.Accumulator(optimizer, every=4)

    @tf.function(jit_compile=True)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.tanh(x @ w) ** 2)
        return acc.apply_gradients([(tape.gradient(loss, w), w)], items=2, loss=loss)

    x = tf.ones([2, 77])
    step(x)
    text = step.experimental_get_compiler_ir(x)(stage="optimized_hlo")
    entry = text[text.index("ENTRY") :].splitlines()
    large = [line for line in entry if " = " in line and "77,33" in line.partition(" metadata=")[0]]
    assert any(" while(" in line for line in large)
    assert not any(f" {operation}(" in line for operation in ("copy", "conditional") for line in large)
