"""Large weights' gradients wait as the rows of two factors: what the window holds, and that nothing else changes."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.grappler import tf_optimizer

import bigbatch.tf1 as bb
from bigbatch.fused.tf1 import DeferredSum
from bigbatch.tf1.accumulators import DenseSum
from conformance import jobs
from conformance.adapters import tf1 as adapters

v1 = tf.compat.v1
WIDTHS = (96, 64, 64, 2)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(200, 96)), RNG.normal(size=(200, 2))
# A product of 96 × 64 keeps at most 28 rows before it has a total, and 9 beside it; one of 64 × 64 keeps 24 and 8.


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


class Deep:
    """Three dense layers, of which the first two have weight gradients much larger than what they are products of."""

    def __init__(self, every=None, length=None, **options):
        self.x, self.y = v1.placeholder(tf.float64, [length, 96]), v1.placeholder(tf.float64, [length, 2])
        h, rng = self.x, np.random.default_rng(1)
        self.weights = []
        for i in range(3):
            w = v1.Variable(rng.normal(size=WIDTHS[i : i + 2]) / 8)
            h = tf.tanh(tf.matmul(h, w) + v1.Variable(rng.normal(size=WIDTHS[i + 1])))
            self.weights.append(w)
        self.loss = tf.reduce_mean((h - self.y) ** 2)
        optimizer = v1.train.MomentumOptimizer(0.5, 0.9)
        if every is None:
            self.op = optimizer.minimize(self.loss)
        else:
            self.acc = bb.Accumulator(optimizer, every, **options)
            self.op = self.acc.minimize(self.loss, items=tf.shape(self.x)[0])
            self.kept = [s for s, _ in self.acc._sums if isinstance(s, DeferredSum)]
        self.session = v1.Session()
        self.session.run(v1.global_variables_initializer())

    def feed(self, start, stop):
        return {self.x: X[start:stop], self.y: Y[start:stop]}

    def run(self, *rows, fetch=None):
        for start, stop in rows:
            self.session.run(self.op if fetch is None else fetch, self.feed(start, stop))

    def values(self):
        return self.session.run(self.weights)

    def rows(self):
        """Of the first weight: how many it keeps, and what shape its total has."""
        left, total = self.session.run([self.kept[0].left, self.kept[0].total])
        return len(left), total.shape


def close(ours, plain):
    for a, b in zip(ours.values(), plain.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "lengths", [(2, 2), (7, 5, 6, 6), (4,) * 7 + (3,), (4,) * 20, (1,) * 60, (28, 1, 9, 1), (40, 3, 40)], ids=str
)
def test_a_window_is_the_batch_whatever_its_rows_take(lengths):
    ours, plain = Deep(every=len(lengths)), Deep()
    assert [s.shape for s in ours.kept] == [[96, 64], [64, 64]]
    for _ in range(3):
        stops = np.cumsum(lengths)
        ours.run(*zip(stops - lengths, stops, strict=True))
        plain.run((0, stops[-1]))
        close(ours, plain)


def test_rows_are_multiplied_out_where_there_is_no_more_room():
    ours = Deep(every=100)
    held = []
    for _ in range(12):
        ours.run((0, 4))
        held.append(ours.rows())
    small, total = (1, 1), (96, 64)
    assert held == [(n, small) for n in range(4, 29, 4)] + [(0, total), (4, total), (8, total), (0, total), (4, total)]
    ours.session.run(ours.acc.zero)
    ours.run((0, 4))
    assert ours.rows() == (4, small), "a new window has the memory of none"


@pytest.mark.parametrize("last", [9, 10])  # in a window of equal micro-batches the sum is the mean
def test_the_last_rows_go_where_the_total_stands(last):
    ours, plain = Deep(every=9), Deep()
    rows = [(4 * n, 4 * n + 4) for n in range(8)] + [(32, 32 + last - 6)]
    ours.run(*rows)
    plain.run((0, 32 + last - 6))
    assert ours.rows() == (0, (96, 64))  # and no second matrix is beside it
    close(ours, plain)


def test_together_with_an_update_in_one_run_and_with_flush():
    ours, plain = Deep(every=100), Deep()
    ours.run((0, 3), (3, 6))
    ours.run((6, 9), fetch=[ours.acc.apply, ours.op, ours.loss])
    plain.run((0, 9))
    close(ours, plain)
    ours.run((9, 12))
    ours.session.run([ours.acc.flush, ours.acc.pending])
    plain.run((9, 12))
    close(ours, plain)


def test_an_infinite_micro_batch_and_an_error_leave_no_trace():
    ours, plain = Deep(every=2), Deep()
    ours.session.run(ours.op, {ours.x: np.full((3, 96), np.inf), ours.y: Y[:3]})
    ours.run((0, 3))
    assert "not finite" in ours.session.run(ours.acc.last).skipped
    close(ours, plain)
    ours.run((0, 3))
    with pytest.raises(tf.errors.InvalidArgumentError):
        ours.session.run(ours.op, {ours.x: X[:3], ours.y: np.zeros((2, 2))})
    ours.session.run(ours.acc.zero)
    ours.run((0, 3), (3, 6))
    plain.run((0, 6))
    close(ours, plain)


def test_what_is_fed_is_not_kept():
    ours, plain = Deep(every=3), Deep()
    for start in (0, 2, 4):
        x = X[start : start + 2].copy()
        ours.session.run(ours.op, {ours.x: x, ours.y: Y[start : start + 2]})
        x[:] = np.nan
    plain.run((0, 6))
    close(ours, plain)


@pytest.mark.parametrize("before", [2, 9])
def test_saved_and_restored_inside_a_window(before, tmp_path):
    rows = [(i, i + 4) for i in range(0, 48, 4)]
    straight = Deep(every=len(rows))
    straight.run(*rows[:before])
    path = v1.train.Saver().save(straight.session, str(tmp_path / "model"))
    straight.run(*rows[before:])
    with tf.Graph().as_default():
        again = Deep(every=len(rows))
        v1.train.Saver().restore(again.session, path)
        again.run(*rows[before:])
        for a, b in zip(again.values(), straight.values(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length", [1, 4, 30])
def test_lengths_that_the_graph_knows(length):
    """Grappler folds what it knows: it must not take a variable for as long as what it is assigned first."""
    ours, plain = Deep(every=60 // length, length=length), Deep()
    for start in (0, 60):
        ours.run(*((i, i + length) for i in range(start, start + 60, length)))
        plain.run((start, start + 60))
    close(ours, plain)


@pytest.mark.parametrize("gate", ["GATE_NONE", "GATE_OP", "GATE_GRAPH"])
def test_products_are_found_behind_the_gates(gate):
    ours = Deep()
    optimizer = v1.train.GradientDescentOptimizer(1.0)
    acc = bb.Accumulator(optimizer, 2)
    acc.minimize(ours.loss, items=2, var_list=ours.weights, gate_gradients=getattr(optimizer, gate))
    assert [type(s) for s, _ in acc._sums] == [DeferredSum, DeferredSum, DenseSum]


def test_what_is_no_product_of_its_own_or_narrower_than_the_sum_is_dense():
    x = v1.placeholder(tf.float32, [None, 64])
    twice, half = (v1.Variable(tf.zeros([64, 64], dtype)) for dtype in (tf.float32, tf.bfloat16))
    h = tf.matmul(tf.matmul(x, twice), twice)
    loss = tf.reduce_mean(tf.matmul(tf.cast(h, tf.bfloat16), half))
    acc = bb.Accumulator(v1.train.GradientDescentOptimizer(1.0), 2)
    acc.minimize(tf.cast(loss, tf.float32), items=2)
    assert [type(s) for s, _ in acc._sums] == [DenseSum, DenseSum]


def test_the_laws_run_with_products_and_without():
    for run, products in ((adapters.Stream, 0), (adapters.StreamProducts, 2)):
        sums = run(jobs.Spec("net", jobs.params("net"))).acc._sums
        assert sum(isinstance(s, DeferredSum) for s, _ in sums) == products


@pytest.mark.parametrize("batch", [None, 4])
def test_variables_that_grow_do_not_spoil_what_grappler_knows_of_shapes(graph, batch):
    """Where it takes what they are assigned for of one shape, it knows none, and oneDNN aborts at a convolution."""
    x = v1.placeholder(tf.float32, [batch, 8, 8, 3])
    kernel, dense = v1.get_variable("kernel", [3, 3, 3, 4]), v1.get_variable("dense", [256, 64])
    h = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME") + v1.get_variable("bias", [4]))
    acc = bb.Accumulator(v1.train.AdamOptimizer(), 2)
    op = acc.minimize(tf.reduce_mean(tf.reshape(h, [-1, 256]) @ dense), items=tf.shape(x)[0])
    assert any(isinstance(s, DeferredSum) for s, _ in acc._sums)
    graph.add_to_collection("train_op", op)
    config = v1.ConfigProto()
    config.graph_options.rewrite_options.optimizers.extend(["function", "remap"])
    config.graph_options.rewrite_options.min_graph_nodes = -1
    rewritten = tf_optimizer.OptimizeGraph(config, v1.train.export_meta_graph(graph=graph))
    (convolution,) = (n for n in rewritten.node if n.name == "Conv2D")
    assert [len(shape.dim) for shape in convolution.attr["_input_shapes"].list.shape] == [4, 4]
