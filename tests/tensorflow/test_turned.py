"""Products with something turned over, computed the other way round: where that is done, and what stays as it was."""

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.engines import tensorflow_turned

ROWS, WIDTH = 7, 300  # TensorFlow's two ways round 7 rows differently


class Deep:
    """Three layers; the gradients of the last two's inputs are such products."""

    def __init__(self, width=WIDTH, turned=False):
        self.turned = turned
        rng = np.random.default_rng(0)
        self.weights = [tf.Variable(rng.normal(size=(width, width)).astype("float32") / width**0.5) for _ in range(3)]
        self.x = tf.constant(rng.normal(size=(4 * ROWS, width)).astype("float32"))

    def loss_fn(self, h):
        for w in self.weights:
            h = tf.tanh(h @ (tf.transpose(w) if self.turned else w))
        return tf.reduce_mean(h)

    def step(self, known=True, **options):
        spec = tf.TensorSpec([4 * ROWS if known else None, self.x.shape[1]])
        return tf.function(
            lambda x: bb.value_and_grad(self.loss_fn, x, self.weights, micro_batch=ROWS),
            input_signature=[spec],
            **options,
        )

    def plain(self, x):
        with tf.GradientTape() as tape:
            loss = self.loss_fn(x)
        return tape.gradient(loss, self.weights)


def readers(step):
    """The operations in a step's graph that read a product with a matrix or rows turned over."""
    graph = step.get_concrete_function().graph.as_graph_def()
    found = []
    for function in graph.library.function:
        products = {node.name for node in function.node_def if node.op == "MatMul" and node.attr["transpose_b"].b}
        read = [(node.op, name.split(":")[0]) for node in function.node_def for name in node.input]
        found += [op for op, name in read if name in products]
    return found


def left_turned_over(step):
    """How many products of two factors' columns are turned over, and read by somebody."""
    graph = step.get_concrete_function().graph.as_graph_def()
    found = 0
    for function in graph.library.function:
        nodes = {node.name: node for node in function.node_def}
        read = {name.split(":")[0] for node in function.node_def for name in (*node.input, *function.ret.values())}
        for node in nodes.values():
            made = nodes.get(node.input[0].split(":")[0]) if node.op == "Transpose" else None
            found += made is not None and made.op == "MatMul" and made.attr["transpose_a"].b and node.name in read
    return found


@pytest.mark.parametrize("turned", [False, True])
def test_the_gradient_is_the_same(turned):
    model = Deep(turned=turned)
    _, ours = model.step()(model.x)
    for g, h in zip(ours, model.plain(model.x), strict=True):
        np.testing.assert_allclose(g, h, rtol=0, atol=40 * WIDTH**0.5 * np.finfo("float32").eps * np.abs(h).max())


def test_both_ways_are_there_where_only_the_run_knows_of_how_many():
    model = Deep()
    ours = model.step(known=False)(model.x)[1]
    for g, h in zip(ours, model.step()(model.x)[1], strict=True):
        np.testing.assert_array_equal(g, h)


def test_a_window_of_one_is_bit_for_bit_what_it_is_without_us(monkeypatch):
    model = Deep()
    one = model.x[:ROWS]
    plain = tf.function(model.plain)(one)
    for g, h in zip(model.step(known=False)(one)[1], plain, strict=True):
        np.testing.assert_array_equal(g, h)
    # And this could fail:
    turn = tensorflow_turned.turn
    monkeypatch.setattr(
        "bigbatch.tensorflow.split.turn", lambda graph, several, gradients: turn(graph, True, gradients)
    )
    assert any(np.any(g != h) for g, h in zip(model.step(known=False)(one)[1], plain, strict=True))


@pytest.mark.parametrize("width", [WIDTH, 32])
def test_large_matrices_are_turned_and_small_ones_left(width):
    """The gradients of two layers' inputs go through tanh's gradient, or first through a transposition."""
    assert set(readers(Deep(width).step())) == {"Transpose" if width == WIDTH else "TanhGrad"}
    assert len(readers(Deep(width).step())) == 2


@pytest.mark.parametrize("width", [WIDTH, 32])
def test_gradients_of_weights_that_the_model_turns_over_are_not_turned_back(width):
    model = Deep(width, turned=True)
    assert left_turned_over(model.step()) == (0 if width == WIDTH else 3)


def test_xla_does_as_it_likes():
    assert set(readers(Deep().step(jit_compile=True))) == {"TanhGrad"}
