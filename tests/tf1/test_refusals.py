"""What is refused when ops are built, in the library's words, and what that leaves behind."""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tf1 as bb

v1 = tf.compat.v1
REFUSED = tf.errors.InvalidArgumentError
EVERY = r"every must be an integer, a callable of the update's index, or items\(n\)\. Received: every="


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def sgd():
    return v1.train.GradientDescentOptimizer(1.0)


class Line:
    def __init__(self):
        self.x = v1.placeholder(tf.float64, [None, 2])
        self.w = v1.get_variable("w", initializer=tf.zeros([2], tf.float64))
        self.each = tf.linalg.matvec(self.x, self.w)
        self.loss = tf.reduce_mean(self.each)

    def minimize(self, every=2, loss=None, items=1, optimizer=None, minimize=None, **options):
        acc = bb.Accumulator(sgd() if optimizer is None else optimizer, every, **options)
        return acc.minimize(self.loss if loss is None else loss, items=items, **(minimize or {}))


TENSORS = {
    "every, a tensor": (lambda n: n.minimize(tf.constant(2)), TypeError, EVERY),
    "every, a list": (lambda n: n.minimize([2]), TypeError, EVERY),
    "every of a tensor of items": (lambda n: bb.items(tf.constant(4)), TypeError, "items must be a number"),
    "every returns a float": (lambda n: n.minimize(lambda k: tf.constant(2.5)), TypeError, EVERY + "shape .*float32"),
    "every returns a bool": (lambda n: n.minimize(lambda k: tf.constant(True)), TypeError, EVERY + "shape .*bool"),
    "every returns text": (lambda n: n.minimize(lambda k: tf.constant("2")), TypeError, EVERY + "shape .*string"),
    "every returns two": (lambda n: n.minimize(lambda k: tf.constant([2, 3])), TypeError, EVERY + r"shape \(2,\)"),
    "every returns None": (lambda n: n.minimize(lambda k: None), TypeError, EVERY + "None"),
    "every returns 2.5": (lambda n: n.minimize(lambda k: 2.5), TypeError, EVERY + "2.5"),
    "clip_norm, a tensor": (lambda n: n.minimize(clip_norm=tf.constant(1.0)), TypeError, "clip_norm must be a number"),
    "clip_norm, nan": (lambda n: n.minimize(clip_norm=float("nan")), ValueError, "clip_norm must be positive"),
    "clip_norm, text": (lambda n: n.minimize(clip_norm="1"), TypeError, "clip_norm must be a number"),
    "partial, a tensor": (lambda n: n.minimize(partial=tf.constant("apply")), ValueError, "partial must be one of"),
    "partial, an array": (lambda n: n.minimize(partial=np.array(["apply", "drop"])), ValueError, "partial must be one"),
    "nonfinite, a list": (lambda n: n.minimize(nonfinite=["skip"]), ValueError, "nonfinite must be one of"),
    "dtype, text": (lambda n: n.minimize(dtype="float32"), TypeError, "dtype must be a floating tf.DType or None"),
    "dtype, an integer's": (lambda n: n.minimize(dtype=tf.int32), TypeError, "dtype must be a floating tf.DType"),
    "dtype, NumPy's": (lambda n: n.minimize(dtype=np.float32), TypeError, "dtype must be a floating tf.DType or None"),
    "items, two": (lambda n: n.minimize(items=tf.shape(n.x)), TypeError, "items must be a number"),
    "items, text": (lambda n: n.minimize(items=tf.constant("4")), TypeError, "items must be a number"),
    "items, complex": (lambda n: n.minimize(items=tf.constant(1j)), TypeError, "items must be a number"),
    "items, an array": (lambda n: n.minimize(items=np.array([4])), TypeError, "items must be a number"),
    "items, None": (lambda n: n.minimize(items=None), TypeError, "items must be a number"),
    "loss, a vector": (lambda n: n.minimize(loss=n.each), ValueError, "The loss must be a scalar"),
    "loss, an integer": (lambda n: n.minimize(loss=tf.constant(1)), ValueError, "The loss must be a scalar"),
    "loss, three values": (lambda n: n.minimize(loss=(n.loss, 1, 2)), ValueError, "The loss must be a scalar"),
    "loss, a function": (lambda n: n.minimize(loss=lambda: n.loss), ValueError, "The loss must be a scalar"),
    "an empty var_list": (lambda n: n.minimize(minimize={"var_list": []}), ValueError, "No variables to optimize"),
    "no gradients": (lambda n: bb.Accumulator(sgd(), 2).apply_gradients([], items=1), ValueError, "No gradients"),
    "a step that is a number": (
        lambda n: n.minimize(minimize={"global_step": 0}),
        TypeError,
        "global_step must be a scalar integer variable or None",
    ),
    "a step that is a weight": (
        lambda n: n.minimize(minimize={"global_step": n.w}),
        TypeError,
        "global_step must be a scalar integer variable or None",
    ),
    "Keras's optimizer": (
        lambda n: n.minimize(optimizer=keras.optimizers.SGD()),
        TypeError,
        "must be a tf.compat.v1.train.Optimizer.*no place in a session; bigbatch.tensorflow and bigbatch.keras",
    ),
    "a class": (lambda n: n.minimize(optimizer=v1.train.AdamOptimizer), TypeError, "Pass the optimizer itself"),
    "an Accumulator": (
        lambda n: n.minimize(optimizer=bb.Accumulator(sgd(), 2)),
        TypeError,
        "An Accumulator accumulates already",
    ),
    "a gradient of another shape": (
        lambda n: bb.Accumulator(sgd(), 2).apply_gradients([(tf.zeros([3], tf.float64), n.w)], items=1),
        ValueError,
        r"of its variable's shape.*\(3,\).*w:0 has shape \(2,\)",
    ),
    "a gradient of integers": (
        lambda n: bb.Accumulator(sgd(), 2).apply_gradients([(tf.constant([1, 2]), n.w)], items=1),
        ValueError,
        "A gradient must be real",
    ),
    "a gradient of a number": (
        lambda n: bb.Accumulator(sgd(), 2).apply_gradients([(tf.zeros([2]), 3)], items=1),
        TypeError,
        "Gradients go with variables",
    ),
    "a loss scale that applies inf": (
        lambda n: n.minimize(
            optimizer=v1.train.experimental.MixedPrecisionLossScaleOptimizer(sgd(), 8.0), nonfinite="apply"
        ),
        ValueError,
        "nonfinite='apply' has no effect with a loss-scaling optimizer",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_refused_when_built(case):
    make, kind, words = TENSORS[case]
    line = Line()
    with pytest.raises(kind, match=words):
        make(line)
    assert v1.get_collection(v1.GraphKeys.TRAIN_OP) == []
    op = line.minimize()  # and the next try is right
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        for value in (1, 3):
            session.run(op, {line.x: [[value, 0]]})
        assert session.run(line.w).tolist() == [-2, 0]


@pytest.mark.parametrize(
    "part", ["accumulate", "apply", "flush", "zero", "pending", "pending_items", "updates", "last"]
)
def test_parts_before_they_are_made(part):
    acc = bb.Accumulator(sgd(), 2)
    with pytest.raises(ValueError, match=f"no `{part}` yet: minimize or apply_gradients makes it"):
        getattr(acc, part)
    with pytest.raises(AttributeError, match="no attribute 'flushed'"):
        _ = acc.flushed
    if part == "flush":
        with pytest.raises(ValueError, match="minimize"):
            bb.FlushHook(acc)


def in_cond(line):
    return tf.cond(tf.constant(True), lambda: tf.group(line.minimize()), tf.no_op)


def in_while(line):
    return tf.while_loop(lambda i: i < 2, lambda i: [tf.group(line.minimize()), i + 1][1:], [0])


def in_function(line):
    return tf.function(lambda: line.minimize())()


@pytest.mark.parametrize("place", [in_cond, in_while, in_function])
def test_inside_control_flow(place):
    with pytest.raises(ValueError, match=r"must be called in the graph itself.*tf.cond, tf.while_loop or a function"):
        place(Line())


def test_without_a_graph_and_under_a_strategy():
    line = Line()
    with ThreadPoolExecutor() as threads:  # where the default is to execute eagerly
        error = threads.submit(line.minimize).exception()
    assert isinstance(error, ValueError)
    assert "no graph to build in" in str(error)
    assert "bigbatch.tensorflow" in str(error)
    with (
        tf.distribute.OneDeviceStrategy("/cpu:0").scope(),
        pytest.raises(ValueError, match=r"OneDeviceStrategy\w* does not run in a session.*bigbatch.tensorflow"),
    ):
        line.minimize()


def test_a_schedule_and_a_loss_whose_shapes_only_a_run_knows():
    line, shape = Line(), v1.placeholder(tf.int32, [None])
    every = v1.placeholder_with_default(tf.constant(2), None)
    loss = tf.reshape(v1.placeholder_with_default(tf.reshape(line.loss, [1]), None), shape)
    op = line.minimize(lambda k: every, loss=loss)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        one = {line.x: [[1, 0]], shape: []}
        session.run(op, one)
        for wrong in ({every: [2, 3]}, {shape: [1]}):
            with pytest.raises(REFUSED):
                session.run(op, {**one, **wrong})


class Counting(v1.train.GradientDescentOptimizer):
    """Makes a counter each time its step is built."""

    def _prepare(self):
        super()._prepare()
        self.count = v1.Variable(0, trainable=False)


def test_an_optimizer_whose_step_makes_new_variables_is_refused():
    with pytest.raises(ValueError, match="makes a new variable each time apply_gradients is called"):
        Line().minimize(optimizer=Counting(1.0))


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_loss_scale_of_either_kind_skips_and_is_reported(dynamic):
    scale = v1.train.experimental.DynamicLossScale(initial_loss_scale=8.0, increment_period=100) if dynamic else 8.0
    inner = v1.train.experimental.MixedPrecisionLossScaleOptimizer(sgd(), scale)
    x, w = v1.placeholder(tf.float32, []), v1.get_variable("w", initializer=0.0)
    acc = bb.Accumulator(inner, 2)
    op = acc.minimize(x * w, items=1)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        for value in (np.inf, 1.0):
            session.run(op, {x: value})
        assert "not finite" in session.run(acc.last).skipped
        assert session.run([w, acc.updates]) == [0, 0]
        for value in (1.0, 3.0):
            session.run(op, {x: value})
        assert session.run([w, acc.updates]) == [-2, 1]
        assert session.run(acc.last).skipped is None
        assert session.run(acc.last.skipped) == b""
