"""The stream door: inside a tf.function, outside, and under XLA; windows of every kind; what it may be given."""

import resource
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from conformance.adapters.tensorflow import FuncGraph, counted

ITEMS = "of examples or tokens the loss is the mean of."


def gradients(n, seed=0):
    rng = np.random.default_rng(seed)
    return [(tf.constant(rng.normal(size=3)), int(k)) for k in rng.integers(1, 9, size=n)]


def mean(parts):
    return sum(n * g.numpy() for g, n in parts) / sum(n for _, n in parts)


@pytest.fixture
def w():
    return tf.Variable(tf.zeros(3, tf.float64))


@pytest.fixture
def sgd():
    return tf.keras.optimizers.SGD(1.0)


@pytest.mark.parametrize("how", ["eager", "function", "run eagerly", "xla"])
def test_inside_a_function_outside_and_under_xla(how, w, sgd):
    acc = bb.Accumulator(sgd, every=3)

    def step(g, n):
        return acc.apply_gradients([(g, w)], items=n, loss=tf.cast(n, tf.float32))

    if how in ("function", "xla"):
        step = tf.function(step, jit_compile=how == "xla")
    tf.config.run_functions_eagerly(how == "run eagerly")
    try:
        parts = gradients(7)
        made = [step(g, tf.constant(n)) for g, n in parts]
        assert [bool(u.closed) for u in made] == [False, False, True, False, False, True, False]
        assert [int(u.micro_batches) for u in made] == [1, 2, 3, 1, 2, 3, 1]
        np.testing.assert_allclose(w, -mean(parts[:3]) - mean(parts[3:6]), rtol=1e-12)
        np.testing.assert_allclose(made[5].grad_norm, np.linalg.norm(mean(parts[3:6])), rtol=1e-12)
        assert float(made[5].items) == sum(n for _, n in parts[3:6])
        np.testing.assert_allclose(
            made[5].loss, np.average([n for _, n in parts[3:6]], weights=[n for _, n in parts[3:6]])
        )
        assert int(acc.flush().micro_batches) == 1
        assert acc.flush() is None
        assert (int(acc.index), int(acc.pending)) == (3, 0)
    finally:
        tf.config.run_functions_eagerly(False)


def test_outside_a_function_it_is_traced_once(w, sgd):
    acc = bb.Accumulator(sgd, every=2)
    parts = gradients(8)
    acc.apply_gradients([(parts[0][0], w)], items=1)
    with counted(FuncGraph, "__init__") as traces:
        for i, (g, n) in enumerate(parts):
            acc.apply_gradients([(g, w)], items=n if i % 2 else float(n))
    assert not traces


def test_an_update_without_a_loss_says_nan(w, sgd):
    update = bb.Accumulator(sgd, every=1).apply_gradients([(tf.ones(3, tf.float64), w)], items=2)
    assert np.isnan(update.loss)
    assert bool(update.made)


def every_by_if(index):
    return 2 if index < 1 else 3


@pytest.mark.parametrize(
    ("every", "closed"),
    [
        (bb.items(8), [0, 1, 0, 0, 1, 0]),
        (every_by_if, [0, 1, 0, 0, 1, 0]),
        (lambda index: 2 + tf.minimum(index, 1), [0, 1, 0, 0, 1, 0]),
    ],
    ids=["items", "an if of Python's", "tensors"],
)
def test_windows_that_are_planned_in_the_graph(every, closed, w, sgd):
    acc = bb.Accumulator(sgd, every=every)
    step = tf.function(lambda g, n: acc.apply_gradients([(g, w)], items=n))
    counts = [3, 7, 2, 5, 1, 4]
    made = [bool(step(tf.ones(3, tf.float64), tf.constant(n)).made) for n in counts]
    assert made == [bool(c) for c in closed]


@pytest.mark.parametrize("every", [lambda index: index, lambda index: 2.5])
def test_a_callables_bad_answers(every, w, sgd):
    acc = bb.Accumulator(sgd, every=every)
    with pytest.raises((tf.errors.InvalidArgumentError, TypeError), match=r"every must be .*\. Received: every="):
        acc.apply_gradients([(tf.ones(3, tf.float64), w)], items=1)


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (tf.constant(0), f"items must be positive. Received: items=0 (int32). Pass the number {ITEMS}"),
        (tf.constant(-1, tf.int64), f"items must be positive. Received: items=-1 (int64). Pass the number {ITEMS}"),
        (tf.constant(-0.5), f"items must be positive. Received: items=-0.5 (float32). Pass the number {ITEMS}"),
        (tf.constant(np.inf), f"items must be finite. Received: items=inf (float32). Pass the number {ITEMS}"),
    ],
)
@pytest.mark.parametrize("how", ["eager", "function"])
@pytest.mark.parametrize("fed", [0, 1, 2])
def test_bad_items_in_the_graph_leave_everything_as_it_was(how, items, words, fed, w):
    optimizer = tf.keras.optimizers.Adam(0.1)
    acc = bb.Accumulator(optimizer, every=3)

    def step(g, n):
        return acc.apply_gradients([(g, w)], items=n, loss=tf.reduce_sum(g))

    if how == "function":
        step = tf.function(step)
    parts = gradients(4)
    step(parts[0][0], tf.constant(1))  # variables are made
    acc.reset()
    for g, n in parts[:fed]:
        step(g, tf.constant(n))
    everything = [w, *(v.value for v in optimizer.variables), *acc.variables]
    before = [v.numpy().copy() for v in everything]
    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        step(tf.fill([3], tf.constant(7.0, tf.float64)), items)
    assert words in str(error.value)
    for v, b in zip(everything, before, strict=True):
        np.testing.assert_array_equal(v, b)


def test_what_it_may_not_be_given(w, sgd):
    with pytest.raises(TypeError, match=r"optimizer must have an apply_gradients method\. Received: optimizer=None"):
        bb.Accumulator(None, every=2)
    with pytest.raises(ValueError, match=r"partial must be one of 'apply', 'carry', 'drop'\. Received: partial='keep'"):
        bb.Accumulator(sgd, every=2, partial="keep")
    acc = bb.Accumulator(sgd, every=2)
    one = tf.ones(3, tf.float64)
    with pytest.raises(TypeError, match=r"items must be a number\. Received: items=True \(bool\)"):
        acc.apply_gradients([(one, w)], items=True)
    with pytest.raises(TypeError, match=r"items must be a number\. Received: items=shape \(2,\)"):
        acc.apply_gradients([(one, w)], items=tf.constant([1, 2]))
    with pytest.raises(ValueError, match="The loss must be a scalar"):
        acc.apply_gradients([(one, w)], items=1, loss=one)
    assert int(acc.pending) == 0


class ByHand:
    """Anything with apply_gradients."""

    def __init__(self):
        self.seen = []

    def apply_gradients(self, grads_and_vars):
        pairs = list(grads_and_vars)
        self.seen.append([v.name for _, v in pairs])
        for g, v in pairs:
            v.assign_sub(tf.convert_to_tensor(g))


def test_an_optimizer_of_your_own(w):
    acc = bb.Accumulator(ByHand(), every=2)
    for g, n in (parts := gradients(2)):
        acc.apply_gradients([(g, w)], items=n)
    np.testing.assert_allclose(w, -mean(parts), rtol=1e-12)


def test_gradients_that_come_and_go(sgd):
    w, extra, never = (tf.Variable(tf.zeros(2), name=name) for name in ("w", "extra", "never"))
    optimizer = ByHand()
    acc = bb.Accumulator(optimizer, every=3)
    one = tf.ones(2)
    for g in (None, one, None):
        update = acc.apply_gradients([(one, w), (g, extra), (None, never)], items=1)
    assert bool(update.made)
    np.testing.assert_allclose(extra, [-1 / 3, -1 / 3])
    assert optimizer.seen[-1] == ["w:0", "extra:0"], "the optimizer is not shown what has no gradient"


def test_a_gradient_that_comes_after_the_graphs_were_traced(sgd):
    w, late = tf.Variable([0.0]), tf.Variable([0.0], name="late")
    one = tf.ones(1)

    def train(acc):
        first = tf.function(lambda: acc.apply_gradients([(one, w), (None, late)], items=1))
        second = tf.function(lambda: acc.apply_gradients([(one, w), (one, late)], items=1))
        first()
        second()

    with pytest.raises(ValueError, match=r"late:0 had no gradient when apply_gradients was first traced"):
        train(bb.Accumulator(sgd, every=2))
    acc = bb.Accumulator(tf.keras.optimizers.SGD(1.0), every=2)
    acc.build([w, late])
    train(acc)
    np.testing.assert_allclose(late, [-0.5])


def test_sparse_gradients_add_up_by_row_and_a_dense_one_may_join():
    table = tf.Variable(tf.zeros([5, 2]))
    optimizer = tf.keras.optimizers.SGD(1.0)
    acc = bb.Accumulator(optimizer, every=2)
    step = tf.function(lambda g: acc.apply_gradients([(g, table)], items=1))
    slices = tf.IndexedSlices(
        tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), tf.constant([1, 1, 4]), tf.constant([5, 2])
    )
    for second in (slices, tf.convert_to_tensor(slices)):
        table.assign(tf.zeros([5, 2]))
        step(slices)
        step(second)
        np.testing.assert_allclose(table, -tf.convert_to_tensor(slices).numpy())


def test_a_table_of_50_million_rows_is_not_made_dense():
    table = tf.Variable(tf.zeros([50_000_000, 1]))
    table_bytes = 50_000_000 * 4
    optimizer = tf.keras.optimizers.SGD(1.0)
    acc = bb.Accumulator(optimizer, every=4)

    @tf.function
    def step(ids):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.gather(table, ids))
        return acc.apply_gradients([(tape.gradient(loss, table), table)], items=100, loss=loss)

    # The peak so far is from making the table. Filled up to it, a second table would make a new one.
    ballast = np.ones(max(0, peak() - resident()), np.uint8)
    before = peak()
    for k in range(8):
        update = step(tf.range(k * 50, k * 50 + 100))
    grown = peak() - before
    assert bool(update.made)
    assert grown < table_bytes / 2, f"{grown >> 20} MiB more beside a table of {table_bytes >> 20} MiB"
    assert float(table[50, 0]) == pytest.approx(-2 * 0.01 / 4)
    del ballast


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_half_precision_variables_accumulate_in_float32(dtype):
    w = tf.Variable(tf.zeros([1], dtype))
    acc = bb.Accumulator(tf.keras.optimizers.SGD(1.0), every=1024)
    step = tf.function(lambda: acc.apply_gradients([(tf.ones([1], dtype), w)], items=1))
    for _ in range(1024):
        step()
    assert float(w[0]) == -1.0, "a sum in bfloat16 stops at 256"


def test_a_loss_scale_optimizer_lowers_its_scale_and_the_next_window_is_clean(w):
    optimizer = tf.keras.mixed_precision.LossScaleOptimizer(tf.keras.optimizers.SGD(1.0), initial_scale=8.0)
    acc = bb.Accumulator(optimizer, every=2)
    one = tf.ones(3, tf.float64)
    step = tf.function(lambda g: acc.apply_gradients([(g, w)], items=1))
    step(one * np.inf)
    assert not bool(step(one).made)
    assert float(optimizer.dynamic_scale) == 4.0
    np.testing.assert_array_equal(w, [0, 0, 0])
    step(8 * one)
    assert bool(step(4 * one).made)
    np.testing.assert_allclose(w, -6 / 4 * one)
    assert (int(optimizer.iterations), int(acc.index)) == (1, 1)


def test_nonfinite_windows_are_applied_for_those_who_ask(w, sgd):
    acc = bb.Accumulator(sgd, every=1, nonfinite="apply")
    assert bool(acc.apply_gradients([(tf.fill([3], tf.constant(np.inf, tf.float64)), w)], items=1).made)
    assert np.isinf(w).all()


def test_reset_forgets_the_window(w, sgd):
    acc = bb.Accumulator(sgd, every=2)
    acc.apply_gradients([(tf.fill([3], tf.constant(np.nan, tf.float64)), w)], items=1)
    acc.reset()
    for g, n in (parts := gradients(2)):
        acc.apply_gradients([(g, w)], items=n)
    np.testing.assert_allclose(w, -mean(parts), rtol=1e-12)


def test_flush_inside_a_function(w, sgd):
    acc = bb.Accumulator(sgd, every=4)
    acc.apply_gradients([(tf.ones(3, tf.float64), w)], items=1)
    flush = tf.function(acc.flush)
    assert bool(flush().made)
    again = flush()
    assert (int(again.micro_batches), bool(again.closed), float(again.items)) == (0, False, 0.0)
    np.testing.assert_array_equal(w, [-1, -1, -1])


def test_two_accumulators_in_one_step(w):
    other = tf.Variable(tf.zeros(3, tf.float64))
    accs = [bb.Accumulator(tf.keras.optimizers.SGD(1.0), every=k) for k in (1, 2)]

    @tf.function
    def step(g):
        return [acc.apply_gradients([(g, v)], items=1) for acc, v in zip(accs, (w, other), strict=True)]

    for g, _ in (parts := gradients(2)):
        step(g)
    np.testing.assert_allclose(w, -parts[0][0] - parts[1][0])
    np.testing.assert_allclose(other, -(parts[0][0] + parts[1][0]) / 2)


def test_a_keras_model_of_keras_variables(sgd):
    model = tf.keras.Sequential([tf.keras.layers.Input((4,)), tf.keras.layers.Dense(3), tf.keras.layers.Dense(1)])
    x = tf.random.stateless_normal([6, 4], [0, 1])
    wanted = [v.numpy() for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    wanted = [v - g.numpy() for v, g in zip(wanted, tape.gradient(loss, model.trainable_variables), strict=True)]
    acc = bb.Accumulator(sgd, every=2)

    @tf.function(reduce_retracing=True)
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        grads = tape.gradient(loss, model.trainable_variables)
        return acc.apply_gradients(zip(grads, model.trainable_variables, strict=True), items=tf.shape(x)[0], loss=loss)

    step(x[:4])
    update = step(x[4:])
    for v, value in zip(model.trainable_variables, wanted, strict=True):
        np.testing.assert_allclose(v, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(update.loss, loss, rtol=1e-6)
