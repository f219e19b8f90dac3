"""What others do to an open window, calls that are cut short, refusals that leave nothing, and damaged checkpoints."""

import json

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb

RATE = 0.25


def gradients(n):
    rng = np.random.default_rng(n)
    return [(tf.constant(rng.normal(size=3)), k) for k in range(1, n + 1)]


def mean(parts):
    return sum(n * g.numpy() for g, n in parts) / sum(n for _, n in parts)


@pytest.fixture
def w():
    return tf.Variable(np.arange(3.0), name="w")


@pytest.fixture(params=["eager", "graph"])
def door(request, w):
    """An Accumulator of 3 and a step of one micro-batch."""
    optimizer = tf.keras.optimizers.SGD(RATE)
    acc = bb.Accumulator(optimizer, every=3)

    def step(g, n):
        return acc.apply_gradients([(g, w)], items=n)

    acc.step = tf.function(step) if request.param == "graph" else step
    return acc


def feed(door, parts):
    update = None
    for g, n in parts:
        update = door.step(g, tf.constant(n))
    return update


def exact_from_here(door, w):
    before, parts = w.numpy(), gradients(3)
    assert bool(feed(door, parts).made)
    np.testing.assert_allclose(w, before - RATE * mean(parts), rtol=1e-14)


ACTS = {
    "a step of the optimizer": lambda door, w: door.optimizer.apply_gradients([(tf.ones(3, tf.float64), w)]),
    "a step that moves nothing": lambda door, w: door.optimizer.apply_gradients([(tf.zeros(3, tf.float64), w)]),
    "an assign": lambda door, w: w.assign(w[::-1]),
    "one number": lambda door, w: w.scatter_nd_update([[1]], [np.nextafter(w.numpy()[1], 9)]),
    "another Accumulator": lambda door, w: bb.Accumulator(tf.keras.optimizers.SGD(1.0), every=1).apply_gradients(
        [(tf.ones(3, tf.float64), w)], items=1
    ),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("place", [1, 2])
def test_what_others_do_inside_a_window_is_refused_and_the_next_is_exact(act, place, door, w):
    parts = gradients(3)
    feed(door, parts[:place])
    ACTS[act](door, w)
    left = w.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError, match="inside an open window") as error:
        feed(door, parts[place:])
    assert "apply_gradients, a second Accumulator, an assign" in str(error.value)
    np.testing.assert_array_equal(w, left)
    assert int(door.pending) == 0
    assert door.flush() is None
    exact_from_here(door, w)


@pytest.mark.parametrize("act", ACTS)
def test_between_windows_others_may_do_what_they_like(act, door, w):
    exact_from_here(door, w)
    ACTS[act](door, w)
    exact_from_here(door, w)


def test_what_changes_nothing_is_no_disturbance(door, w):
    parts = gradients(3)
    before = w.numpy()
    feed(door, parts[:1])
    w.assign(w * 2)  # as an evaluation with averaged weights does
    w.assign(before)
    assert bool(feed(door, parts[1:]).made)
    np.testing.assert_allclose(w, before - RATE * mean(parts), rtol=1e-14)


def test_a_flush_refuses_as_well(door, w):
    feed(door, gradients(2))
    w.assign_add(tf.ones(3, tf.float64))
    left = w.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError, match="w:0 changed inside an open window"):
        door.flush()
    np.testing.assert_array_equal(w, left)
    exact_from_here(door, w)


def test_under_xla_a_foreign_step_and_items_that_are_none_skip_the_window_and_say_so(w):
    acc = bb.Accumulator(tf.keras.optimizers.SGD(RATE), every=2)
    acc.step = tf.function(lambda g, n: acc.apply_gradients([(g, w)], items=n), jit_compile=True)
    parts = gradients(2)
    feed(acc, parts[:1])
    acc.optimizer.apply_gradients([(tf.ones(3, tf.float64), w)])
    left = w.numpy()
    assert "another step inside the window" in feed(acc, parts[1:]).skipped
    for bad in (-2, 0):
        feed(acc, parts[:1])
        assert (
            "a micro-batch's items are negative, NaN or infinite, or zero"
            in acc.step(parts[1][0], tf.constant(bad)).skipped
        )
    np.testing.assert_array_equal(w, left)
    assert bool(feed(acc, parts).made)
    np.testing.assert_allclose(w, left - RATE * mean(parts), rtol=1e-14)


@pytest.mark.parametrize("place", range(4))
def test_a_call_that_is_cut_short_is_never_half_in_a_window(place, w):
    """In one graph an assertion may fail before, between and after our operations."""
    acc = bb.Accumulator(tf.keras.optimizers.SGD(RATE), every=3)
    other = tf.Variable(tf.zeros([200, 200], tf.float64))
    acc.build([w, other])

    @tf.function
    def step(g, n, good):
        large = tf.ones([200, 200], tf.float64) * tf.reduce_sum(g)
        for _ in range(3 if place % 2 else 0):  # later than the other gradient
            large = large @ large / 200
        update = acc.apply_gradients([(g, w), (tf.debugging.check_numerics(large * good, "not good"), other)], items=n)
        tf.debugging.Assert(good == good, ["not good"])
        return update

    acc.step = lambda g, n: step(g, n, tf.constant(1.0, tf.float64))
    parts = gradients(3)
    feed(acc, parts[: place % 3])
    before = w.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError, match="not good"):
        step(*parts[0], tf.constant(np.nan, tf.float64))
    np.testing.assert_array_equal(w, before)
    if int(tf.identity(acc._micro_batches)) < 0:
        with pytest.raises(
            tf.errors.InvalidArgumentError, match="The last call of apply_gradients or flush did not end"
        ):
            feed(acc, parts[:1])
        np.testing.assert_array_equal(w, before)
    else:
        acc.reset()
    exact_from_here(acc, w)


@pytest.mark.parametrize("act", ["assign", "apply_gradients", "Accumulator"])
@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_loss_that_changes_the_variables_is_refused_at_the_split_api(act, how, w):
    optimizer = tf.keras.optimizers.SGD(RATE)
    optimizer.build([w])
    other = bb.Accumulator(optimizer, every=1)
    other.build([w])

    def loss_fn(x):
        loss = tf.reduce_mean(tf.linalg.matvec(x, w) ** 2)
        if act == "assign":
            w.assign_sub(tf.ones(3, tf.float64))
        elif act == "apply_gradients":
            optimizer.apply_gradients([(tf.ones(3, tf.float64), w)])
        else:
            other.apply_gradients([(tf.ones(3, tf.float64), w)], items=1)
        return loss

    def door():
        return bb.value_and_grad(loss_fn, tf.ones([4, 3], tf.float64), [w], micro_batch=2)

    with pytest.raises(RuntimeError, match=f"w:0 changed while its gradient was taken.*{act}"):
        (tf.function(door) if how == "graph" else door)()


BAD_EVERY = {
    "two numbers": lambda update: tf.constant([1, 2]),
    "a matrix": lambda update: tf.zeros([1, 1], tf.int32),
    "a float": lambda update: 2.5,
    "a bool": lambda update: True,
    "text": lambda update: "4",
    "nothing": lambda update: None,
    "two": lambda update: (1, 2),
}


@pytest.mark.parametrize("every", BAD_EVERY)
def test_an_every_that_is_no_number_is_refused_before_anything_is_made(every, w):
    acc = bb.Accumulator(tf.keras.optimizers.SGD(RATE), every=BAD_EVERY[every])
    for call in (acc.apply_gradients, tf.function(acc.apply_gradients)):
        with pytest.raises((TypeError, ValueError), match="every must be an integer"):
            call([(tf.ones(3, tf.float64), w)], items=5)
    assert not acc._sums
    assert not acc.optimizer.built
    np.testing.assert_array_equal(w, np.arange(3.0))


@pytest.mark.parametrize("door_is", ["eager", "graph"])
def test_a_refused_variable_leaves_nothing_behind(door_is, w):
    stranger = tf.Variable(tf.zeros(3, tf.float64), name="stranger")
    optimizer = tf.keras.optimizers.SGD(RATE, momentum=0.5)
    optimizer.build([w])
    acc = bb.Accumulator(optimizer, every=3)
    acc.step = lambda g, n: acc.apply_gradients([(g, w)], items=n)
    parts = gradients(3)
    feed(acc, parts[:1])
    sums, slots = len(acc._sums), len(optimizer.variables)

    def foreign():
        return acc.apply_gradients([(tf.ones(3, tf.float64), stranger)], items=1)

    with pytest.raises(ValueError, match="Unknown variable"):
        (tf.function(foreign) if door_is == "graph" else foreign)()
    assert (len(acc._sums), len(optimizer.variables), int(acc.pending)) == (sums, slots, 1)
    assert bool(feed(acc, parts[1:]).made)
    np.testing.assert_allclose(w, np.arange(3.0) - RATE * mean(parts), rtol=1e-14)
    exact = w.numpy() + 0.5 * (w.numpy() - np.arange(3.0))
    feed(acc, parts)
    np.testing.assert_allclose(w, exact - RATE * mean(parts), rtol=1e-14)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (lambda w: [(w, tf.ones(3, tf.float64))], "grads_and_vars must be pairs"),
        (lambda w: [tf.ones(3, tf.float64)], "grads_and_vars must be pairs"),
        (lambda w: [(tf.ones(4, tf.float64), w)], r"A gradient must have its variable's shape.*shape \(4,\)"),
        (lambda w: [(tf.ones(3, tf.complex128), w)], "floating dtype.*complex128"),
        (lambda w: [(tf.ones(3, tf.float64), w)] * 2, "stands twice in grads_and_vars. Received: w:0 twice"),
    ],
)
def test_what_is_no_pair_of_a_gradient_and_its_variable(pairs, words, door, w):
    feed(door, gradients(1))
    with pytest.raises((TypeError, ValueError), match=words):
        door.apply_gradients(pairs(w), items=1)
    assert int(door.pending) == 1


def test_options_without_effect_and_optimizers_that_accumulate_are_refused():
    accumulating = tf.keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
    text = (
        r"^The optimizer accumulates too\. Received: gradient_accumulation_steps=2\. "
        r"Leave it out: with bigbatch as well it would accumulate twice\.$"
    )
    with pytest.raises(ValueError, match=text):
        bb.Accumulator(accumulating, every=2)
    scaling = tf.keras.mixed_precision.LossScaleOptimizer
    with pytest.raises(ValueError, match=text):
        bb.Accumulator(scaling(accumulating), every=2)
    with pytest.raises(ValueError, match="nonfinite='apply' has no effect with a LossScaleOptimizer"):
        bb.Accumulator(scaling(tf.keras.optimizers.SGD(RATE)), every=2, nonfinite="apply")
    for dtype in ("float32", tf.int32, 32):
        with pytest.raises(
            (TypeError, ValueError), match=r"dtype must be a floating tf\.DType or None\. Received: dtype="
        ):
            bb.Accumulator(tf.keras.optimizers.SGD(RATE), every=2, dtype=dtype)


def saved_window(tmp_path, w, change=None):
    acc = bb.Accumulator(tf.keras.optimizers.SGD(RATE), every=3)
    acc.apply_gradients([(tf.ones(3, tf.float64), w)], items=2)
    acc.apply_gradients([(tf.ones(3, tf.float64), w)], items=3)
    if change is not None:
        change(acc)
    return tf.train.Checkpoint(w=w, acc=acc).write(str(tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda acc: acc._micro_batches.assign(-2), "_micro_batches must be at least 0. Received: micro_batches=-2"),
        (lambda acc: acc._index.assign(-1), "_index must be at least 0. Received: index=-1"),
        (lambda acc: acc._items.assign(-5.0), "_items must be at least 0. Received: items=-5.0"),
        (lambda acc: acc._items.assign(np.nan), "_items must be positive and finite. Received: items=nan"),
        (lambda acc: acc._unit.assign(np.inf), "_unit must be positive and finite. Received: unit=inf"),
        (lambda acc: setattr(acc._seal, "serialize", lambda: '{"index": 0'), "_seal is damaged"),
        (lambda acc: setattr(acc._seal, "serialize", lambda: json.dumps({"index": 0})), "_seal is damaged"),
        (lambda acc: setattr(acc._seal, "serialize", lambda: json.dumps(acc._state() | {"index": 0.5})),
         "_index must be a whole number. Received: index=0.5"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_before_anything_is_restored(change, words, tmp_path, w):
    path = saved_window(tmp_path, tf.Variable(tf.fill([3], tf.constant(7.0, tf.float64))), change)
    acc = bb.Accumulator(tf.keras.optimizers.SGD(RATE), every=3)
    acc.step = lambda g, n: acc.apply_gradients([(g, w)], items=n)
    parts = gradients(3)
    feed(acc, parts[:1])
    with pytest.raises(ValueError, match="The checkpoint's entry " + words):
        tf.train.Checkpoint(w=w, acc=acc).read(path)
    np.testing.assert_array_equal(w, np.arange(3.0))
    assert bool(feed(acc, parts[1:]).made), "the open window is as it was"
    np.testing.assert_allclose(w, np.arange(3.0) - RATE * mean(parts), rtol=1e-14)


@pytest.mark.parametrize("other", [([4], tf.float64), ([3], tf.float32), ([3, 1], tf.float64)])
def test_a_checkpoint_of_other_shapes_or_dtypes_is_refused_before_anything_is_restored(other, tmp_path, w):
    path = saved_window(tmp_path, tf.Variable(tf.fill([3], tf.constant(7.0, tf.float64))))
    v = tf.Variable(tf.zeros(*other))
    acc = bb.Accumulator(tf.keras.optimizers.SGD(RATE), every=3)
    acc.apply_gradients([(tf.ones_like(v), v)], items=1)
    marker = tf.Variable(1.0)
    with pytest.raises(ValueError, match=r"The checkpoint's entry _sums/0 does not fit\. Received: DenseSum of shape"):
        tf.train.Checkpoint(marker=marker, acc=acc).read(path)
    assert int(acc.pending) == 1
    acc.apply_gradients([(tf.ones_like(v), v)], items=1)
    assert bool(acc.apply_gradients([(tf.ones_like(v), v)], items=1).made)
    np.testing.assert_allclose(v, -RATE * tf.ones_like(v))
