"""Under tf.distribute: exact with unequal items on the replicas, and one reduction of the gradient a window."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.distribute import cross_device_ops

import bigbatch.tensorflow as bb
from conformance.adapters.tensorflow import CPUS

# Sizes of each replica's micro-batches, in the order in which they come.
SIZES = [(3, 1), (2, 4), (1, 1), (5, 2)]
OPTIMIZERS = {
    "momentum": lambda: tf.keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: tf.keras.optimizers.AdamW(0.1, weight_decay=0.1, use_ema=True),
}


@pytest.fixture
def strategy():
    return tf.distribute.MirroredStrategy(CPUS)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return [tuple(tf.constant(rng.normal(size=(n, 3))) for n in sizes) for sizes in SIZES]


def loss_of(w, x):
    return tf.reduce_mean(tf.tanh(tf.linalg.matvec(x, w)) ** 2)


class Training:
    def __init__(self, strategy, make_optimizer, **options):
        self.strategy = strategy
        with strategy.scope():
            self.w = tf.Variable(tf.constant([1.0, 2.0, 3.0], tf.float64))
            self.optimizer = make_optimizer()
            self.acc = bb.Accumulator(self.optimizer, **options)
        self.checkpoint = tf.train.Checkpoint(w=self.w, optimizer=self.optimizer, acc=self.acc)

        @tf.function(input_signature=[[tf.TensorSpec([None, 3], tf.float64)] * 2])
        def feed(parts):
            return strategy.run(self.replica_step, args=(parts,))

        self.feed = feed

    def replica_step(self, parts):
        here = tf.distribute.get_replica_context().replica_id_in_sync_group
        x = tf.cond(tf.equal(here, 0), lambda: parts[0], lambda: parts[1])
        with tf.GradientTape() as tape:
            loss = loss_of(self.w, x)
        return self.acc.apply_gradients([(tape.gradient(loss, self.w), self.w)], items=tf.shape(x)[0], loss=loss)


def by_hand(make_optimizer, windows):
    """The big batch, on one device."""
    w, optimizer = tf.Variable(tf.constant([1.0, 2.0, 3.0], tf.float64)), make_optimizer()
    for window in windows:
        x = tf.concat([part for parts in window for part in parts], 0)
        with tf.GradientTape() as tape:
            loss = loss_of(w, x)
        optimizer.apply_gradients([(tape.gradient(loss, w), w)])
    return w, loss


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_unequal_items_on_the_replicas_make_the_big_batchs_update(kind, strategy, data):
    run = Training(strategy, OPTIMIZERS[kind], every=4)
    for parts in data + data:
        update = run.feed(list(parts))
    w, loss = by_hand(OPTIMIZERS[kind], [data, data])
    np.testing.assert_allclose(run.w, w, rtol=1e-12)
    for replica in strategy.experimental_local_results(run.w):
        np.testing.assert_array_equal(replica, run.w)
    assert (int(update.index), int(update.micro_batches), float(update.items)) == (1, 4, 19.0)
    np.testing.assert_allclose(update.loss, loss, rtol=1e-12)
    assert bool(update.made)
    assert update.skipped is None
    assert run.optimizer.iterations.numpy() == 2


@pytest.mark.parametrize("every", [bb.items(19), lambda index: 4 + 0 * index], ids=["items", "callable"])
def test_windows_that_close_alike_on_every_replica(every, strategy, data):
    run = Training(strategy, OPTIMIZERS["momentum"], every=every)
    for parts in data:
        run.feed(list(parts))
    np.testing.assert_allclose(run.w, by_hand(OPTIMIZERS["momentum"], [data])[0], rtol=1e-12)
    assert (int(run.acc.index), int(run.acc.pending)) == (1, 0)


def test_one_reduction_of_the_gradient_a_window(strategy, data, monkeypatch):
    reduced = {name: tf.Variable(0) for name in ("reduce", "batch_reduce")}

    def counting(name):
        real = getattr(cross_device_ops.ReductionToOneDevice, f"{name}_implementation")

        def implementation(self, *args, **kwargs):
            reduced[name].assign_add(1)  # in the graph: it counts what runs
            return real(self, *args, **kwargs)

        return implementation

    for name in reduced:
        monkeypatch.setattr(cross_device_ops.ReductionToOneDevice, f"{name}_implementation", counting(name))
    strategy = tf.distribute.MirroredStrategy(CPUS, cross_device_ops.ReductionToOneDevice())
    run = Training(strategy, OPTIMIZERS["momentum"], every=4)
    run.feed(list(data[0]))  # variables are made, and their first values mirrored
    for name in reduced:
        reduced[name].assign(0)
    for i, parts in enumerate([*data[1:], *data]):
        counts = {name: int(count) for name, count in reduced.items()}
        # One batch of gradients, which here has one variable, and [items, loss, squares]: nothing inside a window.
        windows = (i + 1) // 4
        assert counts == {"batch_reduce": windows, "reduce": windows * (1 + 1)}
        run.feed(list(parts))
    assert int(run.acc.index) == 2


def test_flush_and_the_next_window(strategy, data):
    run = Training(strategy, OPTIMIZERS["momentum"], every=4)
    for parts in data[:3]:
        run.feed(list(parts))
    update = run.acc.flush()
    assert (int(update.micro_batches), float(update.items)) == (3, 12.0)
    for parts in data:
        run.feed(list(parts))
    np.testing.assert_allclose(run.w, by_hand(OPTIMIZERS["momentum"], [data[:3], data])[0], rtol=1e-12)
    assert run.acc.flush() is None


def test_a_checkpoint_inside_a_window_holds_the_replicas_sums(strategy, data, tmp_path):
    before, after = (Training(strategy, OPTIMIZERS["adamw"], every=4) for _ in range(2))
    for parts in data[:2]:
        before.feed(list(parts))
    after.checkpoint.read(before.checkpoint.write(str(tmp_path / "checkpoint")))
    assert int(after.acc.pending) == 2
    for parts in data[2:]:
        after.feed(list(parts))
    np.testing.assert_allclose(after.w, by_hand(OPTIMIZERS["adamw"], [data])[0], rtol=1e-12)


def test_an_inf_on_one_replica_skips_the_window_everywhere(strategy, data):
    run = Training(strategy, OPTIMIZERS["momentum"], every=2)
    bad = (data[0][0], tf.fill([1, 3], tf.constant(np.inf, tf.float64)))
    run.feed(list(bad))
    assert run.feed(list(data[1])).skipped.startswith("the window is not finite")
    np.testing.assert_array_equal(run.w, [1, 2, 3])
    for parts in data[:2]:
        run.feed(list(parts))
    np.testing.assert_allclose(run.w, by_hand(OPTIMIZERS["momentum"], [data[:2]])[0], rtol=1e-12)


def test_a_loss_scale_sees_an_inf_on_any_replica(strategy, data):
    def scaled():
        return tf.keras.mixed_precision.LossScaleOptimizer(tf.keras.optimizers.SGD(0.1), initial_scale=4.0)

    run = Training(strategy, scaled, every=2)
    with strategy.scope():
        run.optimizer.build([run.w])
    run.feed([data[0][0], tf.fill([1, 3], tf.constant(np.inf, tf.float64))])
    assert not bool(run.feed(list(data[1])).made)
    assert run.optimizer.dynamic_scale.numpy() == 2.0
    np.testing.assert_array_equal(run.w, [1, 2, 3])


CLIPPING = [{"global_clipnorm": 0.02}, {"clipnorm": 0.02}, {"clipvalue": 0.01}]


@pytest.mark.parametrize("clipping", CLIPPING, ids=lambda c: next(iter(c)))
@pytest.mark.parametrize("loss_scale", [False, True])
def test_clipping_is_of_the_mean_over_all_replicas(clipping, loss_scale, strategy, data):
    def make():
        return tf.keras.optimizers.SGD(1.0, momentum=0.9, **clipping)

    def made():
        return tf.keras.mixed_precision.LossScaleOptimizer(make(), initial_scale=1.0) if loss_scale else make()

    run = Training(strategy, made, every=4)
    if loss_scale:
        with strategy.scope():
            run.optimizer.build([run.w])
    for parts in data + data:
        update = run.feed(list(parts))
    w, _ = by_hand(make, [data, data])
    free, _ = by_hand(lambda: tf.keras.optimizers.SGD(1.0, momentum=0.9), [data, data])
    np.testing.assert_allclose(run.w, w, rtol=1e-12)
    assert np.linalg.norm(w - free) > 0.01, "it was clipped"
    for replica in strategy.experimental_local_results(run.w):
        np.testing.assert_array_equal(replica, run.w)
    assert bool(update.made)


def test_the_norm_of_what_is_clipped_is_told(strategy, data):
    run = Training(strategy, lambda: tf.keras.optimizers.SGD(1.0, global_clipnorm=0.1), every=4)
    for parts in data:
        update = run.feed(list(parts))
    w = tf.Variable(tf.constant([1.0, 2.0, 3.0], tf.float64))
    with tf.GradientTape() as tape:
        loss = loss_of(w, tf.concat([part for parts in data for part in parts], 0))
    np.testing.assert_allclose(update.grad_norm, tf.norm(tape.gradient(loss, w)), rtol=1e-12)
    run = Training(strategy, OPTIMIZERS["momentum"], every=1)
    assert np.isnan(run.feed(list(data[0])).grad_norm), "the optimizer adds the gradient up, and nobody else sees it"


def test_an_inf_on_one_replica_skips_a_window_that_would_be_clipped(strategy, data):
    run = Training(strategy, lambda: tf.keras.optimizers.SGD(1.0, global_clipnorm=0.1), every=1)
    update = run.feed([data[0][0], tf.fill([1, 3], tf.constant(np.inf, tf.float64))])
    assert update.skipped.startswith("the window is not finite")
    np.testing.assert_array_equal(run.w, [1, 2, 3])
    assert bool(run.feed(list(data[1])).made)


def test_an_accumulator_of_another_scope(strategy, data):
    run = Training(strategy, OPTIMIZERS["momentum"], every=2)
    run.acc = bb.Accumulator(run.optimizer, every=2)
    with pytest.raises(ValueError, match=r"Received: MirroredStrategy\. Make it inside strategy\.scope\(\)\."):
        run.feed(list(data[0]))


def test_a_strategy_of_one_replica(data):
    run = Training(tf.distribute.OneDeviceStrategy(CPUS[1]), OPTIMIZERS["momentum"], every=4)
    for parts in data:
        update = run.feed(list(parts))
    first = [(x,) for x, _ in data]
    np.testing.assert_allclose(run.w, by_hand(OPTIMIZERS["momentum"], [first])[0], rtol=1e-12)
    assert np.isfinite(update.grad_norm)


def test_outside_a_function(strategy, data):
    run = Training(strategy, OPTIMIZERS["momentum"], every=4)
    for parts in data:
        update = strategy.run(run.replica_step, args=(list(parts),))
    assert bool(update.made)
    np.testing.assert_allclose(run.w, by_hand(OPTIMIZERS["momentum"], [data])[0], rtol=1e-12)
