"""A table that is looked up and multiplied with: its gradient is taken apart, and comes to what it was."""

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb

WORDS, WIDTH = 60, 6
TOKENS = tf.constant(np.random.default_rng(0).integers(WORDS // 3, size=(30, 3)))  # of which most come several times


class Tied:
    """Scores of all words, from the sum of three words' rows."""

    def __init__(self, dtype="float64", words=WORDS, every=None):
        rng = np.random.default_rng(1)
        self.table = tf.Variable(rng.normal(size=(words, WIDTH)).astype(dtype))
        self.mix = tf.Variable(rng.normal(size=(WIDTH, WIDTH)).astype(dtype))
        self.variables = [self.table, self.mix]
        self.optimizer = tf.keras.optimizers.SGD(0.5, momentum=0.9)
        self.acc = None if every is None else bb.Accumulator(self.optimizer, every)
        self.step = tf.function(self.step_on, reduce_retracing=True)

    def loss_fn(self, tokens):
        x = tf.reduce_sum(tf.gather(self.table, tokens), 1) @ self.mix
        return tf.reduce_mean(tf.tanh(tf.linalg.matmul(x, self.table, transpose_b=True)) ** 3)

    def plain(self, tokens):
        with tf.GradientTape() as tape:
            loss = self.loss_fn(tokens)
        return tape.gradient(loss, self.variables)

    def split(self, length=None, micro_batch=4, **options):
        spec = tf.TensorSpec([length, TOKENS.shape[1]], TOKENS.dtype)
        return tf.function(
            lambda t: bb.value_and_grad(self.loss_fn, t, self.variables, micro_batch=micro_batch)[1],
            input_signature=[spec],
            **options,
        )

    def step_on(self, tokens):
        pairs = list(zip(self.plain(tokens), self.variables, strict=True))
        if self.acc is None:
            return self.optimizer.apply_gradients(pairs)
        return self.acc.apply_gradients(pairs, items=tf.shape(tokens)[0])


def operations(step):
    """The kinds of all operations in a step's graph and in the functions that it calls."""
    graph = step.get_concrete_function().graph.as_graph_def()
    return {node.op for function in graph.library.function for node in function.node_def}


@pytest.mark.parametrize("length", [28, 30, 3, None])
def test_the_split_doors_gradient_is_the_batchs(length):
    model = Tied()
    step = model.split(length)
    assert "InplaceAdd" in operations(step)
    for n in [length] if length else [28, 30, 3, 4, 30]:  # the same graph, run again and again
        for g, h in zip(step(TOKENS[:n]), model.plain(TOKENS[:n]), strict=True):
            np.testing.assert_allclose(tf.convert_to_tensor(g), h, rtol=1e-12, atol=1e-14)


def test_the_stream_doors_update_is_the_batchs():
    ours, plain = Tied(every=5), Tied()
    for _ in range(3):
        start = 0
        for n in (7, 2, 9, 1, 11):
            ours.step(TOKENS[start : start + n])
            start += n
        plain.step(TOKENS)
        for v, w in zip(ours.variables, plain.variables, strict=True):
            np.testing.assert_allclose(v, w, rtol=1e-11, atol=1e-13)
    taken = ours.step.get_concrete_function(tf.TensorSpec([None, 3], TOKENS.dtype)).graph.get_operations()
    assert "ResourceScatterAdd" in {operation.type for operation in taken}


def test_a_window_of_one_is_the_bare_optimizer_bit_for_bit():
    ours, plain = Tied("float32", every=1), Tied("float32")
    for model in (ours, plain):
        model.step(TOKENS)
    for v, w in zip(ours.variables, plain.variables, strict=True):
        np.testing.assert_array_equal(v, w)
    for length in (30, None):
        for g, h in zip(ours.split(length, 30)(TOKENS), tf.function(ours.plain)(TOKENS), strict=True):
            np.testing.assert_array_equal(tf.convert_to_tensor(g), h)


def test_a_table_with_hardly_more_rows_than_were_looked_up_stays_whole():
    assert "InplaceAdd" not in operations(Tied(words=45).split(28))
    assert "InplaceAdd" in operations(Tied(words=48).split(28))


def test_under_xla_and_outside_a_graph():
    model = Tied()
    eager = bb.value_and_grad(model.loss_fn, TOKENS, model.variables, micro_batch=4)[1]
    for found in (eager, model.split(30, jit_compile=True)(TOKENS)):
        for g, h in zip(found, model.plain(TOKENS), strict=True):
            np.testing.assert_allclose(tf.convert_to_tensor(g), h, rtol=1e-12, atol=1e-14)


def test_the_gradient_of_its_norm():
    model = Tied()

    def of_the_norm(gradient):
        @tf.function
        def twice(tokens):
            with tf.GradientTape() as tape:
                norm = tf.linalg.global_norm(gradient(tokens))
            return tape.gradient(norm, model.variables)

        return twice(TOKENS)

    for g, h in zip(of_the_norm(model.split(30)), of_the_norm(model.plain), strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(g), tf.convert_to_tensor(h), rtol=1e-11, atol=1e-13)
