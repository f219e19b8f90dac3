"""Convolutions' gradients in a loop of XLA's: written the one way that is fast there on a CPU, and the same numbers."""

import re

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.fused.tensorflow_conv_layout import with_fast_convolutions

FAST = {"b01f_01io->b01f", "b012f_012io->b012f"}


def gradients(x, kernel, options):
    with tf.GradientTape() as tape:
        tape.watch((x, kernel))
        convolution = tf.nn.conv2d if x.shape.rank == 4 else tf.nn.conv3d
        loss = tf.reduce_sum(tf.sin(convolution(x, kernel, **options)))
    return tape.gradient(loss, (x, kernel))


@pytest.mark.parametrize("places", [(11, 9), (6, 5, 7)])
@pytest.mark.parametrize(
    ("kernel", "strides", "dilations"),
    [(1, 1, 1), (1, 3, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (3, 2, 1), (2, 3, 1), (5, 2, 1), (2, 1, 3), (3, 1, 2)],
)
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_the_gradients_are_the_same(places, kernel, strides, dilations, padding):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(4, *places, 3)))
    w = tf.constant(rng.normal(size=(*[kernel] * len(places), 3, 6)))
    steps, holes = ([1, *[n] * len(places), 1] for n in (strides, dilations))
    options = {"strides": steps, "padding": padding, "dilations": holes}
    read = []

    # Outside XLA a CPU's convolutions in three dimensions have no holes, and are wrong for kernels of one place.
    @tf.function(autograph=False, jit_compile=True)
    def wanted():
        return gradients(x, w, options)

    @tf.function(autograph=False, jit_compile=True)
    def changed():
        graph = tf.compat.v1.get_default_graph()
        found = with_fast_convolutions(graph, gradients(x, w, options))
        read.extend(op.type for op in graph.get_operations() if "Backprop" in op.type and op.outputs[0].consumers())
        return found

    for g, h in zip(changed(), wanted(), strict=True):
        assert g.shape == h.shape
        np.testing.assert_allclose(g, h, rtol=0, atol=1e-12 * np.abs(h).max())
    assert not read


@pytest.mark.parametrize("padding", [[[0, 0], [2, 0], [0, 3], [0, 0]], [[0, 0], [5, 4], [1, 1], [0, 0]]])
def test_paddings_of_ones_own(padding):
    rng = np.random.default_rng(0)
    x, w = tf.constant(rng.normal(size=(4, 8, 7, 3))), tf.constant(rng.normal(size=(3, 4, 3, 2)))

    def run(change):
        with tf.GradientTape() as tape:
            tape.watch((x, w))
            loss = tf.reduce_sum(tf.sin(tf.nn.conv2d(x, w, 2, padding)))
        found = tape.gradient(loss, (x, w))
        return with_fast_convolutions(tf.compat.v1.get_default_graph(), found) if change else found

    for g, h in zip(*(tf.function(run, autograph=False)(change) for change in (True, False)), strict=True):
        np.testing.assert_allclose(g, h, rtol=0, atol=1e-12 * np.abs(h).max())


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize(("kernel", "strides", "dilations"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 3, 1), (3, 1, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_depthwise_ones(kernel, strides, dilations, padding, many):
    rng = np.random.default_rng(0)
    x, w = tf.constant(rng.normal(size=(4, 11, 9, 2))), tf.constant(rng.normal(size=(kernel, kernel, 2, many)))

    def run(change):
        with tf.GradientTape() as tape:
            tape.watch((x, w))
            y = tf.nn.depthwise_conv2d(x, w, [1, strides, strides, 1], padding, dilations=[dilations] * 2)
            loss = tf.reduce_sum(tf.sin(y))
        found = tape.gradient(loss, (x, w))
        if change:
            found = with_fast_convolutions(tf.compat.v1.get_default_graph(), found)
            read = [op.type for op in tf.compat.v1.get_default_graph().get_operations() if op.outputs and
                    op.outputs[0].consumers()]  # fmt: skip
            assert "DepthwiseConv2dNativeBackpropFilter" not in read
        return found

    step = tf.function(run, autograph=False, jit_compile=True)
    for g, h in zip(step(True), step(False), strict=True):
        assert g.shape == h.shape
        np.testing.assert_allclose(g, h, rtol=0, atol=1e-12 * np.abs(h).max())


@pytest.mark.parametrize("options", [{"dilations": 2, "strides": 2}, {"groups": 2}])
def test_what_is_left_as_it_is(options):
    x = tf.ones([2, 8, 8, 4])
    w = tf.ones([3, 3, 4 // options.get("groups", 1), 4])
    given = {name: value for name, value in options.items() if name != "groups"}

    @tf.function(autograph=False)
    def run():
        graph = tf.compat.v1.get_default_graph()
        found = gradients(x, w, {"strides": 1, "padding": "VALID", **given})
        assert with_fast_convolutions(graph, found) is found
        return found

    run.get_concrete_function()


class Network:
    """Two convolutions, one with strides, and one the other way."""

    def __init__(self):
        rng = np.random.default_rng(0)
        shapes = [(3, 3, 2, 4), (3, 3, 4, 4), (2, 2, 3, 4)]
        self.weights = [tf.Variable(rng.normal(size=shape) / 4) for shape in shapes]
        self.x = tf.constant(rng.normal(size=(7, 9, 8, 2)))

    def loss_fn(self, x):
        first, second, third = self.weights
        x = tf.tanh(tf.nn.conv2d(x, first, 1, "SAME"))
        x = tf.tanh(tf.nn.conv2d(x, second, 2, "VALID"))
        return tf.reduce_mean(tf.nn.conv2d_transpose(x, third, [len(x), 8, 6, 3], 2, "SAME") ** 2)

    def step(self, micro_batch):
        def run(x):
            return bb.value_and_grad(self.loss_fn, x, self.weights, micro_batch=micro_batch)

        return tf.function(run, input_signature=[tf.TensorSpec(self.x.shape, self.x.dtype)], jit_compile=True)

    def plain(self):
        with tf.GradientTape() as tape:
            loss = self.loss_fn(self.x)
        return loss, tape.gradient(loss, self.weights)


def layouts(step, x):
    """Of all convolutions in the compiled program."""
    return set(re.findall(r"dim_labels=(\S+?)[,}\s]", step.experimental_get_compiler_ir(x)(stage="optimized_hlo")))


def test_the_door_loops_over_fast_ones():
    network = Network()
    step = network.step(2)
    loss, found = step(network.x)
    wanted, whole = network.plain()
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    for g, h in zip(found, whole, strict=True):
        np.testing.assert_allclose(g, h, rtol=0, atol=1e-12 * np.abs(h).max())
    assert layouts(step, network.x) <= FAST


def test_a_window_of_one_is_bit_for_bit_the_plain_step():
    network = Network()
    loss, found = network.step(7)(network.x)
    wanted, whole = tf.function(network.plain, jit_compile=True)()
    np.testing.assert_array_equal(loss, wanted)
    for g, h in zip(found, whole, strict=True):
        np.testing.assert_array_equal(g, h)
