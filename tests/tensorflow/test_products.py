"""The stream door keeps the rows of large matrices' gradients: what a window holds, and that nothing else changes."""

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.fused.tensorflow import DeferredSum
from bigbatch.tensorflow.accumulators import DenseSum

WIDTHS = (96, 64, 64, 2)
RNG = np.random.default_rng(0)
X, Y = tf.constant(RNG.normal(size=(200, 96))), tf.constant(RNG.normal(size=(200, 2)))
# Beside its total a product of 96 × 64 keeps at most 9 rows, and one of 64 × 64 keeps 8.


class Deep(tf.Module):
    """Three dense layers, of which the first two have weight gradients much larger than what they are products of."""

    def __init__(self, every=None, jit=False, **options):
        super().__init__()
        rng = np.random.default_rng(1)
        self.weights = [tf.Variable(rng.normal(size=WIDTHS[i : i + 2]) / 8) for i in range(3)]
        self.optimizer = tf.keras.optimizers.SGD(0.5, momentum=0.9)
        self.acc = None if every is None else bb.Accumulator(self.optimizer, every, **options)
        self.step = tf.function(self.step_on, jit_compile=jit, reduce_retracing=True)

    def step_on(self, x, y):
        with tf.GradientTape() as tape:
            h = x
            for w in self.weights:
                h = tf.tanh(h @ w)
            loss = tf.reduce_mean((h - y) ** 2)
        pairs = list(zip(tape.gradient(loss, self.weights), self.weights, strict=True))
        if self.acc is None:
            return self.optimizer.apply_gradients(pairs)
        return self.acc.apply_gradients(pairs, items=tf.shape(x)[0], loss=loss)

    def feed(self, lengths, start=0, step=None):
        for n in lengths:
            (step or self.step)(X[start : start + n], Y[start : start + n])
            start += n

    def held(self):
        """How many rows each product holds."""
        return [int(tf.shape(one.left)[0]) for one in self.acc._sums if isinstance(one, DeferredSum)]


def same(one, other, atol=1e-12):
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def test_large_matrices_have_rows_and_others_none():
    model = Deep(every=4)
    model.feed([2])
    assert [type(one) for one in model.acc._sums] == [DeferredSum, DeferredSum, DenseSum]
    assert model.held() == [2, 2]
    saved_as = [kind for kind, _, _ in model.acc._state()["sums"]]
    assert saved_as == ["ProductSum", "ProductSum", "DenseSum"], "in checkpoints"


@pytest.mark.parametrize("lengths", [[2, 2, 2], [5, 1, 4, 3, 2], [30, 2, 30], [2] * 40])
def test_ragged_windows_are_the_batch_whether_the_room_is_full_or_not(lengths):
    ours, plain = Deep(every=len(lengths)), Deep()
    for start in (0, sum(lengths)):
        ours.feed(lengths, start)
        plain.feed([sum(lengths)], start)
    same(ours, plain)


def test_rows_never_take_more_than_a_quarter():
    model, most = Deep(every=100), [0, 0]
    for start in range(0, 60, 2):
        model.feed([2], start)
        most = list(map(max, most, model.held()))
    assert most == [8, 8]


def test_where_few_micro_batches_rows_would_find_room_none_wait():
    model, plain = Deep(every=3), Deep()
    for start in (0, 12):
        model.feed([4], start)
        assert model.held() == [0, 0]
        model.feed([2], start + 4)
        assert model.held() == [2, 2]
        model.feed([6], start + 6)
        plain.feed([12], start)
    same(model, plain)


def test_a_window_of_one_is_the_bare_optimizer_bit_for_bit():
    ours, plain = Deep(every=1), Deep()
    for model in (ours, plain):
        model.feed([7, 5, 9])
    same(ours, plain, 0)


def test_rows_that_are_not_finite_never_reach_the_next_window():
    ours, clean = Deep(every=2), Deep(every=2)
    update = ours.step(X[:4] * np.nan, Y[:4])
    update = ours.step(X[:4], Y[:4])
    assert "not finite" in update.skipped
    for model in (ours, clean):
        model.feed([2, 4], 10)
    same(ours, clean, 0)


@pytest.mark.parametrize("built", [False, True])
def test_a_checkpoint_inside_a_window_goes_on_bit_for_bit(built, tmp_path):
    before = Deep(every=6)
    before.feed([6, 5, 2])  # with rows, and a total
    path = tf.train.Checkpoint(model=before).write(str(tmp_path / "checkpoint"))
    before.feed([2], 13)
    before.acc.flush()

    after = Deep(every=6)
    tf.train.Checkpoint(model=after).read(path)
    if built:
        after.acc.build(after.weights)
        assert after.held() == [2, 2]
    after.feed([2], 13)
    after.acc.flush()
    same(after, before, 0)


@pytest.mark.parametrize("order", [[False, True, True], [True, False, True], [False, False, True], [True, True, False]])
def test_with_and_without_xla_in_one_window(order):
    ours, plain = Deep(every=3), Deep()
    ours.acc.build(ours.weights)
    steps = {jit: tf.function(ours.step_on, jit_compile=jit) for jit in (False, True)}
    for start in (0, 6):
        for i, jit in enumerate(order):
            ours.feed([2], start + 2 * i, steps[jit])
        plain.feed([6], start)
    same(ours, plain)


def test_gradients_that_come_dense_are_added_up_as_they_come():
    """Clipped by the user, and eagerly."""
    ours, plain = Deep(every=2), Deep()
    ours.step_on(X[:3], Y[:3])
    assert ours.held() == [0, 0]
    ours.feed([4], 3)
    plain.feed([7])
    same(ours, plain)
