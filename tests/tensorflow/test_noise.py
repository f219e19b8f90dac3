"""The noise scale in TensorFlow's Accumulator: the right numbers, in a function, outside and under XLA."""

import math

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
import conformance.adapters.tensorflow  # noqa: F401 (makes two devices of one, before the first tensor)
from bigbatch.noise import Noise

rng = np.random.default_rng(0)
GRADS, ITEMS = [tf.constant(rng.normal(size=5)) for _ in range(4)], [3, 1, 4, 2]


def by_hand(grads=GRADS, items=ITEMS):
    total = sum(items)
    mean = sum(n * g.numpy() for g, n in zip(grads, items, strict=True)) / total
    squares = sum(n * float(g.numpy() @ g.numpy()) for g, n in zip(grads, items, strict=True))
    return Noise.of(len(items), total, squares, float(mean @ mean))


def make(every=4, noise=1, optimizer=None, **options):
    w = tf.Variable(tf.zeros(5, tf.float64))
    return w, bb.Accumulator(optimizer or tf.keras.optimizers.SGD(0.1), every=every, noise=noise, **options)


def close(noise, wanted, relative=1e-12):
    got = [float(x) for x in noise]
    assert got == pytest.approx([wanted.micro_batches, wanted.items, wanted.trace, wanted.squared_norm], rel=relative)


@pytest.mark.parametrize("how", ["eager", "function", "xla"])
def test_a_window_says_what_every_gradient_by_itself_would(how):
    w, acc = make()

    def step(g, n):
        return acc.apply_gradients([(g, w)], items=n)

    if how != "eager":
        step = tf.function(step, jit_compile=how == "xla")
    updates = [step(g, tf.constant(n)) for g, n in zip(GRADS * 2, ITEMS * 2, strict=True)]
    close(updates[3].noise, by_hand())
    close(updates[7].noise, by_hand())
    assert all(math.isnan(float(u.noise.trace)) for u in updates if not u.closed)
    assert acc.noise_scale.windows == 2
    assert acc.noise_scale.trace == pytest.approx(by_hand().trace)


def test_rows_named_twice():
    table = tf.Variable(tf.zeros((4, 2), tf.float64))
    acc = bb.Accumulator(tf.keras.optimizers.SGD(0.1), every=2, noise=1)
    dense = [tf.constant(rng.normal(size=(4, 2))) for _ in range(2)]
    rows, shape = tf.constant([0, 1, 2, 3] * 2), tf.constant([4, 2])
    sparse = [tf.IndexedSlices(tf.concat([g / 2, g / 2], 0), rows, shape) for g in dense]
    for g in sparse:
        update = acc.apply_gradients([(g, table)], items=2)
    close(update.noise, by_hand([tf.reshape(g, [-1]) for g in dense], [2, 2]))


def test_one_window_in_twenty_and_none_by_default():
    w, acc = make(every=2, noise=True)
    updates = [acc.apply_gradients([(g, w)], items=n) for g, n in zip(GRADS * 11, ITEMS * 11, strict=True)]
    assert [k for k, u in enumerate(u for u in updates if u.closed) if not math.isnan(float(u.noise.trace))] == [0, 20]
    w, acc = make(noise=False)
    with pytest.raises(ValueError, match="The Accumulator measures no noise"):
        print(acc.noise_scale)
    assert len(acc.variables) < len(make()[1].variables)


def test_the_variables_are_the_same_to_the_bit():
    results = []
    for noise in (False, 1):
        w, acc = make(noise=noise)
        for g, n in zip(GRADS * 3, ITEMS * 3, strict=True):
            acc.apply_gradients([(g, w)], items=n)
        results.append(w.numpy())
    np.testing.assert_array_equal(*results)


def test_under_a_loss_scale():
    optimizer = tf.keras.mixed_precision.LossScaleOptimizer(tf.keras.optimizers.SGD(0.1), initial_scale=8.0)
    w, acc = make(optimizer=optimizer)
    for g, n in zip(GRADS, ITEMS, strict=True):
        update = acc.apply_gradients([(g * 8, w)], items=n)
    close(update.noise, by_hand())


def test_saved_and_restored_inside_a_window(tmp_path):
    w, acc = make()
    for g, n in zip(GRADS[:2], ITEMS[:2], strict=True):
        acc.apply_gradients([(g, w)], items=n)
    path = tf.train.Checkpoint(w=w, acc=acc).save(str(tmp_path / "inside"))
    w, acc = make()
    acc.build([w])
    tf.train.Checkpoint(w=w, acc=acc).restore(path).assert_consumed()
    for g, n in zip(GRADS[2:], ITEMS[2:], strict=True):
        update = acc.apply_gradients([(g, w)], items=n)
    close(update.noise, by_hand())


@pytest.mark.parametrize("every", [4, bb.until_noise(at_most=4)], ids=str)
def test_a_window_of_nan_is_left_out(every):
    w, acc = make(every)
    for g, n in zip([GRADS[0] * math.nan, *GRADS[1:]], ITEMS, strict=True):
        update = acc.apply_gradients([(g, w)], items=n)
    assert update.skipped.startswith("the window is not finite")
    assert acc.noise_scale.windows == 0
    for g, n in zip(GRADS, ITEMS, strict=True):
        acc.apply_gradients([(g, w)], items=n)
    assert acc.noise_scale.windows >= 1
    assert math.isfinite(acc.noise_scale.trace)


def test_zero_gradients_and_windows_of_one():
    w, acc = make(bb.until_noise(at_most=4))
    updates = [acc.apply_gradients([(g * 0, w)], items=2) for g in GRADS]
    assert [bool(u.closed) for u in updates] == [False, True] * 2
    assert str(acc.noise_scale).startswith("none: the gradient is zero")
    w, acc = make(1)
    acc.apply_gradients([(GRADS[0], w)], items=2)
    assert "no window held two micro-batches" in str(acc.noise_scale)


def test_bad_input():
    with pytest.raises(ValueError, match="noise must be True, False or an integer of at least 1"):
        make(noise=0)
    for noise in (True, 5):
        with pytest.raises(ValueError, match=r"noise has no effect with every=until_noise.*Received: noise="):
            make(bb.until_noise(at_most=4), noise)
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope(), pytest.raises(ValueError, match=r"under a tf\.distribute"):
        make()


def run(every, count, draw):
    """Many micro-batches in one tf.function: (closed, items, trace, squared norm) of each."""
    w = tf.Variable(tf.zeros(200, tf.float64))
    acc = bb.Accumulator(tf.keras.optimizers.SGD(0.0), every=every, noise=1)
    acc.build([w])

    @tf.function
    def loop():
        rows = tf.TensorArray(tf.float64, count)
        for k in tf.range(count):
            g, n = draw(k)
            u = acc.apply_gradients([(g, w)], items=n)
            row = [tf.cast(u.closed, tf.float64), u.items, u.noise.trace, u.noise.squared_norm]
            rows = rows.write(k, tf.stack(row))
        return rows.stack()

    rows = loop().numpy()
    return acc, rows[rows[:, 0] == 1]


@pytest.mark.parametrize("sizes", [[4] * 8, [1, 2, 3, 10, 4, 4, 6, 2]], ids=["equal", "ragged"])
def test_monte_carlo(sizes):
    scales, gradient = tf.linspace(tf.constant(0.5, tf.float64), 1.5, 200), math.sqrt(10 / 200)
    items = tf.constant(sizes)

    def draw(k):
        n = items[k % len(sizes)]
        noise = tf.random.stateless_normal([200], [7, k], dtype=tf.float64)  # the mean of n items
        return gradient + scales * noise / tf.sqrt(tf.cast(n, tf.float64)), n

    acc, rows = run(len(sizes), 3000 * len(sizes), draw)
    assert abs(rows[:, 2].mean() / float(tf.reduce_sum(scales**2)) - 1) < 0.01
    assert abs(rows[:, 3].mean() / 10 - 1) < 0.01
    assert acc.noise_scale.windows == 3000


def test_windows_close_themselves():
    def draw(k):
        noise = tf.random.stateless_normal([200], [3, k], dtype=tf.float64)
        return 200**-0.5 * (1.0 + 10.0 * noise / math.sqrt(2)), tf.constant(2)

    acc, rows = run(bb.until_noise(at_most=512), 2000, draw)
    assert 80 < rows[:, 1].mean() < 130  # of 100, and a look comes up to a quarter late
    assert {int(n) // 2 for n in rows[:, 1]} <= set(acc.every.looks)
    assert (rows[:, 2] <= rows[:, 3] * rows[:, 1]).all()
