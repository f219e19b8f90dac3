"""A table that is looked up and multiplied with: its gradient is taken apart, and comes to what it was."""

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1
WORDS, WIDTH = 60, 6
TOKENS = np.random.default_rng(0).integers(WORDS // 3, size=(30, 3))  # of which most come several times


class Tied:
    """Scores of all words, from the sum of three words' rows."""

    def __init__(self, every=None, dtype="float64", first="product", gate=v1.train.Optimizer.GATE_OP):
        self.graph = tf.Graph()
        with self.graph.as_default():
            rng = np.random.default_rng(1)
            self.tokens = v1.placeholder(tf.int64, [None, 3])
            self.table = v1.Variable(rng.normal(size=(WORDS, WIDTH)).astype(dtype), use_resource=first == "rows")
            mix = v1.Variable(rng.normal(size=(WIDTH, WIDTH)).astype(dtype))
            x = tf.matmul(tf.reduce_sum(tf.gather(self.table, self.tokens), 1), mix)
            loss = tf.reduce_mean(tf.tanh(tf.matmul(x, self.table, transpose_b=True)) ** 3)
            optimizer = v1.train.MomentumOptimizer(0.5, 0.9)
            if every is None:
                self.op = optimizer.minimize(loss, gate_gradients=gate)
            else:
                acc = bb.Accumulator(optimizer, every)
                self.op = acc.minimize(loss, items=tf.shape(self.tokens)[0], gate_gradients=gate)
            self.session = v1.Session()
            self.session.run(v1.global_variables_initializer())

    def run(self, *lengths):
        start = 0
        for n in lengths:
            self.session.run(self.op, {self.tokens: TOKENS[start : start + n]})
            start += n

    def value(self):
        return self.session.run(self.table)

    def scatters(self):
        return sum(
            node.op == "ResourceScatterAdd"
            for function in self.graph.as_graph_def().library.function
            for node in function.node_def
        )


# Of a variable of the old kind its rows come after the product, of a resource before.
@pytest.mark.parametrize("first", ["product", "rows"])
@pytest.mark.parametrize(
    "gate", [v1.train.Optimizer.GATE_NONE, v1.train.Optimizer.GATE_OP, v1.train.Optimizer.GATE_GRAPH]
)
def test_the_update_is_the_batchs(first, gate):
    ours, plain = Tied(5, first=first, gate=gate), Tied(first=first)
    assert ours.scatters() == 2  # into a window's first micro-batch, and into the others
    for _ in range(3):
        ours.run(7, 2, 9, 1, 11)
        plain.run(30)
        np.testing.assert_allclose(ours.value(), plain.value(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("first", ["product", "rows"])
def test_a_window_of_one_is_the_bare_optimizer_bit_for_bit(first):
    ours, plain = Tied(1, "float32", first), Tied(None, "float32", first)
    for model in (ours, plain):
        model.run(10, 10, 10)
    np.testing.assert_array_equal(ours.value(), plain.value())
