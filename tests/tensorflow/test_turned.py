"""Products with something turned over, computed the other way round: where that is done, and what stays as it was."""

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.fused import tensorflow as fused
from bigbatch.fused import tensorflow_split, tensorflow_transposes

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

    def streamed(self, every, **options):
        """A step that takes one micro-batch in, and its Accumulator, whose updates take the mean gradient itself."""
        acc = bb.Accumulator(tf.keras.optimizers.SGD(1.0), every=every)

        @tf.function(input_signature=[tf.TensorSpec([ROWS, self.x.shape[1]])], **options)
        def step(x):
            grads = self.plain(x)
            # What the call stands under may wait for the very gradients that come to be computed anew.
            with tf.control_dependencies(grads):
                return acc.apply_gradients(zip(grads, self.weights, strict=True), items=ROWS)

        return step, acc

    def plain(self, x):
        with tf.GradientTape() as tape:
            loss = self.loss_fn(x)
        return tape.gradient(loss, self.weights)


def readers(step):
    """The operations in a step's graph that read a product with a matrix or rows turned over."""
    graph = step.get_concrete_function().graph.as_graph_def()
    found = []
    for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
        products = {node.name for node in nodes if node.op == "MatMul" and node.attr["transpose_b"].b}
        read = [(node.op, name.split(":")[0]) for node in nodes for name in node.input]
        found += [op for op, name in read if name in products]
    return found


def made_of(step, kind):
    """For each operation of a kind in a step's functions that somebody reads: those that made its first two inputs."""
    graph = step.get_concrete_function().graph.as_graph_def()
    found = []
    for function in graph.library.function:
        nodes = {node.name: node for node in function.node_def}
        read = {name.split(":")[0] for node in function.node_def for name in (*node.input, *function.ret.values())}
        for node in function.node_def:
            if node.op == kind and node.name in read:
                found.append([nodes[name] for name in (x.split(":")[0] for x in node.input[:2]) if name in nodes])
    return found


def left_turned_over(step):
    """How many products of two factors' columns are turned over, and read by somebody."""
    turned = [made[0] for made in made_of(step, "Transpose") if made]
    return sum(node.op == "MatMul" and node.attr["transpose_a"].b for node in turned)


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
    fast = tensorflow_transposes.with_fast_products
    monkeypatch.setattr(tensorflow_split, "with_fast_products", lambda graph, several, found: fast(graph, True, found))
    assert any(np.any(g != h) for g, h in zip(model.step(known=False)(one)[1], plain, strict=True))


@pytest.mark.parametrize("width", [WIDTH, 32])
def test_large_matrices_are_turned_and_small_ones_left(width):
    """The gradients of two layers' inputs go through tanh's gradient, or first through a transposition."""
    assert set(readers(Deep(width).step())) == {"Transpose" if width == WIDTH else "TanhGrad"}
    assert len(readers(Deep(width).step())) == 2


@pytest.mark.parametrize("width", [WIDTH, 32])
def test_weights_that_the_model_turns_over_are_read_as_they_lie(width):
    """In the layer itself, and for the gradient of its inputs."""
    factors = {node.op for made in made_of(Deep(width, turned=True).step(), "MatMul") for node in made}
    assert ("Transpose" in factors) == (width != WIDTH)


@pytest.mark.parametrize("width", [WIDTH, 32])
def test_gradients_of_weights_that_the_model_turns_over_are_not_turned_back(width):
    model = Deep(width, turned=True)
    assert left_turned_over(model.step()) == (0 if width == WIDTH else 3)


@pytest.mark.parametrize("turned", [False, True])
def test_the_streams_gradient_is_the_same(turned):
    model = Deep(turned=turned)
    before, wanted = [w.numpy() for w in model.weights], model.plain(model.x)
    step, _ = model.streamed(every=4)
    assert [bool(step(part).made) for part in tf.split(model.x, 4)] == [False, False, False, True]
    for w, start, g in zip(model.weights, before, wanted, strict=True):
        bound = 40 * WIDTH**0.5 * np.finfo("float32").eps * np.abs(start).max()
        np.testing.assert_allclose(w, start - g, rtol=0, atol=bound)


@pytest.mark.parametrize("turned", [False, True])
def test_a_flushed_window_of_one_is_the_plain_step_to_the_bit(turned, monkeypatch):
    def after_one():
        model = Deep(turned=turned)
        step, acc = model.streamed(every=4)
        wanted = [w - g for w, g in zip(model.weights, tf.function(model.plain)(model.x[:ROWS]), strict=True)]
        step(model.x[:ROWS])
        acc.flush()
        return [bool(np.all(w == v)) for w, v in zip(model.weights, wanted, strict=True)]

    assert all(after_one())
    # And this could fail:
    fast = tensorflow_transposes.with_fast_products
    monkeypatch.setattr(fused, "with_fast_products", lambda graph, several, found: fast(graph, True, found))
    assert not all(after_one())


def test_in_the_stream_large_products_are_in_a_conditional_and_windows_of_one_have_none():
    assert set(readers(Deep().streamed(every=4)[0])) == {"Transpose", "Identity"}, "the results of either branch"
    assert set(readers(Deep(width=32).streamed(every=4)[0])) == {"TanhGrad"}
    assert set(readers(Deep().streamed(every=1)[0])) == {"TanhGrad"}


def test_xla_does_as_it_likes():
    assert set(readers(Deep().step(jit_compile=True))) == {"TanhGrad"}
    assert set(readers(Deep().streamed(every=4, jit_compile=True)[0])) == {"TanhGrad"}
