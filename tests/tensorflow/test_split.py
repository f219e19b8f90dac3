"""The split door: batches as people nest them, gradients as GradientTape returns them, errors without a trace."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from conformance.adapters.tensorflow import FuncGraph, counted


class Pair(NamedTuple):
    x: tf.Tensor
    y: tf.Tensor


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return tf.constant(rng.normal(size=(7, 4))), tf.constant(rng.normal(size=(7, 3)))


@pytest.fixture
def weights():
    return tf.Variable(np.random.default_rng(1).normal(size=(4, 3)))


def full(loss_fn, batch, variables):
    with tf.GradientTape() as tape:
        loss = loss_fn(batch)
    return loss, tape.gradient(loss, variables)


def same(got, wanted):
    for g, w in zip(tf.nest.flatten(got), tf.nest.flatten(wanted), strict=True):
        np.testing.assert_allclose(tf.convert_to_tensor(g), tf.convert_to_tensor(w), rtol=1e-13)


@pytest.mark.parametrize("micro_batch", [1, 3, 7, 100])
@pytest.mark.parametrize("how", ["eager", "graph", "unknown length", "xla"])
def test_it_is_the_tapes_own_gradient(how, micro_batch, data, weights):
    def loss_fn(batch):
        return tf.reduce_mean((tf.tanh(batch.x @ weights) - batch.y) ** 2)

    def door(x, y):
        return bb.value_and_grad(loss_fn, Pair(x, y), [weights], micro_batch=micro_batch)

    run = {
        "eager": door,
        "graph": tf.function(door),
        "unknown length": tf.function(
            door, input_signature=[tf.TensorSpec([None, 4], tf.float64), tf.TensorSpec(None, tf.float64)]
        ),
        "xla": tf.function(door, jit_compile=True),
    }[how]
    same(run(*data), full(loss_fn, Pair(*data), [weights]))


def test_batches_nest_as_tf_nest_does(data, weights):
    x, y = data
    batch = {"b": [x, (y, None)], "a": {"names": tf.constant([str(i) for i in range(7)])}}
    seen = []

    @tf.function
    def step(batch):
        def loss_fn(m):
            seen.append((m["a"]["names"].shape[0], m["b"][1][1]))
            return tf.reduce_mean((m["b"][0] @ weights - m["b"][1][0]) ** 2)

        return bb.value_and_grad(loss_fn, batch, [weights], micro_batch=3)

    _, (gradient,) = step(batch)
    same(gradient, full(lambda _: tf.reduce_mean((x @ weights - y) ** 2), None, [weights])[1][0])
    assert seen == [(3, None), (1, None)], "traced once, and once more for the shorter last one"


def test_the_mean_is_over_the_items_that_loss_fn_names(data, weights):
    x, y = data
    mask = tf.constant([1, 1, 0, 0, 1, 0, 1], tf.float64)

    def loss_fn(batch):
        x, y, mask = batch
        tokens = tf.reduce_sum(mask)
        return tf.reduce_sum(mask[:, None] * (x @ weights - y) ** 2) / tokens, tokens

    for door in (bb.value_and_grad, tf.function(bb.value_and_grad)):
        got = door(loss_fn, (x, y, mask), [weights], micro_batch=3)
        same(got, full(lambda b: loss_fn(b)[0], (x, y, mask), [weights]))


def test_one_loop_one_micro_batch_at_a_time_and_no_retracing(data, weights):
    @tf.function
    def step(x, y):
        return bb.value_and_grad(
            lambda b: tf.reduce_mean((b[0] @ weights - b[1]) ** 2), (x, y), [weights], micro_batch=2
        )

    step(*data)
    loops = [op for op in step.get_concrete_function(*data).graph.get_operations() if "While" in op.type]
    assert [op.get_attr("parallel_iterations") for op in loops] == [1]
    with counted(FuncGraph, "__init__") as traces:
        step(*data)
    assert not traces


def test_missing_and_sparse_gradients(data, weights):
    table, never = tf.Variable(tf.ones([9, 4], tf.float64)), tf.Variable(1.0)
    ids = tf.constant([1, 1, 2, 8, 1, 2, 2])

    def loss_fn(batch):
        ids, y = batch
        return tf.reduce_mean((tf.gather(table, ids) @ weights - y) ** 2)

    wanted = full(loss_fn, (ids, data[1]), [table, weights])
    for door in (bb.value_and_grad, tf.function(bb.value_and_grad)):
        for micro_batch in (2, 10):
            loss, gradients = door(loss_fn, (ids, data[1]), [table, never, weights], micro_batch=micro_batch)
            assert gradients[1] is None
            assert isinstance(gradients[0], tf.IndexedSlices)
            assert sorted(gradients[0].indices.numpy()) == [1, 2, 8], "each row once, and no table"
            same((loss, [gradients[0], gradients[2]]), wanted)


@pytest.mark.parametrize("dtype", [tf.bfloat16, tf.float16])
def test_half_precision_variables_accumulate_in_float32(dtype):
    w = tf.Variable(tf.ones([1], dtype))
    x = tf.ones([1024, 1], dtype)
    step = tf.function(lambda: bb.value_and_grad(lambda b: tf.reduce_mean(b @ w[:, None]), x, [w], micro_batch=1))
    loss, (gradient,) = step()
    assert (loss.dtype, gradient.dtype) == (tf.float32, dtype)
    assert (float(loss), float(gradient[0])) == (1.0, 1.0), "a sum in bfloat16 stops at 256"


def test_mixed_float16_with_a_loss_scale(data):
    tf.keras.utils.set_random_seed(0)
    layers = [tf.keras.layers.Dense(8, "tanh", dtype="mixed_float16"), tf.keras.layers.Dense(1, dtype="mixed_float16")]
    model = tf.keras.Sequential([tf.keras.layers.Input((4,)), *layers])
    optimizer = tf.keras.mixed_precision.LossScaleOptimizer(tf.keras.optimizers.SGD(0.1), initial_scale=256.0)
    optimizer.build(model.trainable_variables)
    x, y = (tf.cast(t, tf.float32) for t in data)

    def loss_fn(batch):
        x, y = batch
        return optimizer.scale_loss(tf.reduce_mean((tf.cast(model(x), tf.float32) - y[:, :1]) ** 2))

    step = tf.function(lambda: bb.value_and_grad(loss_fn, (x, y), model.trainable_variables, micro_batch=3))
    _, gradients = step()
    _, wanted = full(loss_fn, (x, y), model.trainable_variables)
    for g, w in zip(gradients, wanted, strict=True):
        assert g.dtype == tf.float32
        # Both round each of 7 products to float16's 11 bits.
        np.testing.assert_allclose(g, w, atol=float(tf.norm(w)) * 7 * 2.0**-10)


def test_loss_fn_is_converted_by_autograph_and_ours_is_silent(data, weights, caplog):
    def loss_fn(x):
        loss = tf.reduce_mean(x @ weights)
        if loss < 0:
            loss = -loss
        return loss

    tf.get_logger().addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            loss, _ = tf.function(lambda x: bb.value_and_grad(loss_fn, x, [weights], micro_batch=7))(data[0])
            tf.function(
                lambda x: bb.value_and_grad(loss_fn, x, [weights], micro_batch=3),
                input_signature=[tf.TensorSpec([None, 4], tf.float64)],
            )(data[0])
    finally:
        tf.get_logger().removeHandler(caplog.handler)
    assert float(loss) == abs(float(tf.reduce_mean(data[0] @ weights)))
    assert not caplog.records


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (lambda m: 0 * tf.shape(m)[0], "items must be positive. Received: items=0 (int32). Pass the number"),
        (lambda m: tf.constant(-1.5), "items must be positive. Received: items=-1.5 (float32). Pass the number"),
        (lambda m: tf.constant(np.nan), "items must be finite. Received: items=nan (float32). Pass the number"),
    ],
)
def test_bad_items_in_the_graph_leave_the_variables_as_they_were(items, words, data, weights):
    optimizer = tf.keras.optimizers.SGD(1.0)
    before = weights.numpy()

    @tf.function
    def step(x):
        _, gradients = bb.value_and_grad(lambda m: (tf.reduce_mean(m @ weights), items(m)), x, [weights], micro_batch=2)
        optimizer.apply_gradients(zip(gradients, [weights], strict=True))

    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        step(data[0])
    assert words + " of examples or tokens the loss is the mean of." in str(error.value)
    np.testing.assert_array_equal(weights, before)


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ((8, 7), "The leaves of a batch must have the same length. Received: batch['x'] of length 8, batch['y'] of "
         "length 7. Give every leaf one entry an example along its leading dimension."),
        ((0, 0), "The batch is empty. Received: batch['x'] of length 0. Pass at least one example."),
    ],
)  # fmt: skip
def test_lengths_that_only_the_graph_knows(lengths, words, weights):
    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float64)] * 2)
    def step(x, y):
        return bb.value_and_grad(lambda b: tf.reduce_mean(b["x"] @ weights), {"x": x, "y": y}, [weights], micro_batch=2)

    with pytest.raises(tf.errors.InvalidArgumentError) as error:
        step(*(tf.ones([n, 4], tf.float64) for n in lengths))
    assert words in str(error.value).replace("\\'", "'")  # TensorFlow escapes what an assertion shows


def test_what_loss_fn_may_not_return(data, weights):
    def door(loss_fn, batch=data[0]):
        return bb.value_and_grad(loss_fn, batch, [weights], micro_batch=3)

    with pytest.raises(
        ValueError, match=r"The loss must be a scalar of a floating type. Received: loss=shape \(3, 3\)"
    ):
        door(lambda x: x @ weights)
    with pytest.raises(ValueError, match="The loss must be a scalar"):
        door(lambda x: 1.0)
    with pytest.raises(ValueError, match="The loss needs no gradient"):
        door(lambda x: tf.reduce_mean(x))
    with pytest.raises(ValueError, match=r"items must be positive. Received: items=0 \(int\)"):
        door(lambda x: (tf.reduce_mean(x @ weights), 0))
    with pytest.raises(TypeError, match=r"items must be a number. Received: items=shape \(2,\), dtype .*int32"):
        door(lambda x: (tf.reduce_mean(x @ weights), tf.constant([1, 2])))
    with pytest.raises(TypeError, match=r"A leaf of a batch must be an array .* Received: batch\[1\]=shape \(\)"):
        door(lambda b: tf.reduce_mean(b[0] @ weights), (data[0], tf.constant(1.0)))
    with pytest.raises(ValueError, match="The batch holds no arrays"):
        door(lambda b: tf.reduce_mean(weights), {})


def test_a_nan_is_returned_for_a_loss_scale_to_see(data, weights):
    loss, (gradient,) = bb.value_and_grad(
        lambda x: tf.reduce_mean(x @ weights) * np.nan, data[0], [weights], micro_batch=3
    )
    assert np.isnan(loss)
    assert np.isnan(gradient).all()


class Deep:
    """Three dense layers, of which the first two have weight gradients much larger than what they are products of."""

    def __init__(self, examples, inputs=96):
        rng = np.random.default_rng(0)
        widths = (inputs, 64, 64, 2)
        self.weights = [tf.Variable(rng.normal(size=widths[i : i + 2]) / 8) for i in range(3)]
        self.biases = [tf.Variable(rng.normal(size=n)) for n in widths[1:]]
        self.variables = self.weights + self.biases
        self.batch = tf.constant(rng.normal(size=(examples, inputs))), tf.constant(rng.normal(size=(examples, 2)))

    def loss_fn(self, batch):
        h, y = batch
        for w, b in zip(self.weights, self.biases, strict=True):
            h = tf.tanh(tf.linalg.matmul(h, w) + b)
        return tf.reduce_mean((h - y) ** 2)


# Of micro-batches of 2, thirteen products take three quarters of the gradients' memory, and four a quarter.
@pytest.mark.parametrize("examples", [2, 16, 17, 64, 75])
@pytest.mark.parametrize("how", ["graph", "unknown length", "xla"])
def test_small_factors_of_weight_gradients_are_kept_and_multiplied_out_once(examples, how):
    model = Deep(examples)

    def door(x, y):
        return bb.value_and_grad(model.loss_fn, (x, y), model.variables, micro_batch=2)

    run = {
        "graph": tf.function(door),
        "unknown length": tf.function(door, input_signature=[tf.TensorSpec([None, n], tf.float64) for n in (96, 2)]),
        "xla": tf.function(door, jit_compile=True),
    }[how]
    loss, gradients = run(*model.batch)
    wanted, tapes = full(model.loss_fn, model.batch, model.variables)
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    for g, t in zip(gradients, tapes, strict=True):
        np.testing.assert_allclose(g, t, rtol=1e-10, atol=1e-13)
    if how == "graph" and examples <= 26:
        ops = run.get_concrete_function(*model.batch).graph.get_operations()
        assert sum(op.type == "MatMul" for op in ops) == 2, "the two, after the loop"


@pytest.mark.parametrize(
    "batch", [(8, 4), (160, 4), (16, 72)], ids=["products alone", "products beside sums", "added up as they come"]
)
def test_there_are_never_two_copies_of_the_gradients(batch):
    command = [sys.executable, str(Path(__file__).with_name("peak.py")), *map(str, batch)]
    # Tensors mapped one by one, so that the process holds what they hold, and no holes of the heap's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    copies = float(done.stdout.split()[-2])
    assert 0.9 < copies < 2.0, done.stdout


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_list_of_text_is_cut_with_the_batch(how, data, weights):
    captions, seen = ["red", "green", "blue", "red", "red", "green", "blue"], []

    def loss_fn(batch):
        assert batch["captions"].dtype == tf.string
        seen.append(batch["captions"].shape[0])
        shown = tf.cast(batch["captions"] == "red", tf.float64)
        return tf.reduce_mean(shown * tf.reduce_sum(batch["x"] @ weights, 1))

    def door(x):
        return bb.value_and_grad(loss_fn, {"x": x, "captions": captions}, [weights], micro_batch=3)

    found = (tf.function(door) if how == "graph" else door)(data[0])
    assert set(seen) == {3, 1}
    same(found, full(loss_fn, {"x": data[0], "captions": tf.constant(captions)}, [weights]))
    with pytest.raises(ValueError, match=r"must have the same length. Received: batch\[0\] of length 7, batch\[1\] of"):
        bb.value_and_grad(lambda b: tf.reduce_mean(b[0] @ weights), (data[0], captions[:6]), [weights], micro_batch=3)


@pytest.mark.parametrize("with_items", [False, True])
def test_an_output_that_has_a_loss_may_be_returned(with_items, data, weights):
    class Output(dict):
        def __init__(self, loss, logits):
            super().__init__(loss=loss, logits=logits)
            self.loss = loss

    def loss_fn(x):
        output = Output(tf.reduce_mean(x @ weights), x)
        return (output, tf.shape(x)[0]) if with_items else output

    found = tf.function(lambda x: bb.value_and_grad(loss_fn, x, [weights], micro_batch=3))(data[0])
    same(found, full(lambda x: tf.reduce_mean(x @ weights), data[0], [weights]))


@pytest.mark.parametrize("door", ["value_and_grad", "plan", "auto"])
def test_words_at_the_split_api(door, data, weights):
    def call(loss_fn, **options):
        if door == "plan":
            return bb.plan(loss_fn, data[0], [weights], **options)
        options = {"micro_batch": "auto" if door == "auto" else 3, **options}
        return bb.value_and_grad(loss_fn, data[0], [weights], **options)

    with pytest.raises(ValueError, match=r"^The loss must be a scalar of a floating type\. Received: loss=shape"):
        call(lambda x: tf.reduce_mean(x @ weights, 1))
    with pytest.raises(
        TypeError, match=r"^loss_fn must return the mean loss or \(loss, items\)\. Received: a tuple of 3"
    ):
        call(lambda x: (tf.reduce_mean(x @ weights), 3, tf.constant(0.5)))
    for dtype in ("float32", tf.int32):
        with pytest.raises(
            (TypeError, ValueError), match=r"^dtype must be a floating tf\.DType or None\. Received: dtype="
        ):
            call(lambda x: tf.reduce_mean(x @ weights), dtype=dtype)
    if door == "value_and_grad":
        with pytest.raises(
            TypeError, match=r"^micro_batch must be an integer or \"auto\"\. Received: micro_batch='Auto'"
        ):
            call(lambda x: tf.reduce_mean(x @ weights), micro_batch="Auto")


def test_under_xla_items_that_are_none_make_everything_nan(data, weights):
    """XLA makes no checks; a number would be wrong in silence."""
    for bad in (-1.0, 0.0, np.inf):
        step = tf.function(
            lambda x, bad=bad: bb.value_and_grad(
                lambda m: (tf.reduce_mean(m @ weights), tf.constant(bad)), x, [weights], micro_batch=3
            ),
            jit_compile=True,
        )
        loss, (gradient,) = step(data[0])
        assert np.isnan(loss)
        assert np.isnan(gradient).all()
