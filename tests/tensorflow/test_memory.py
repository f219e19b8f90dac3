"""micro_batch="auto" and plan: read off the traced graph, once for each shape; an out-of-memory costs only time."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.engines.tensorflow_estimate import is_out_of_memory, peak
from bigbatch.host import Memory

planning = importlib.import_module("bigbatch.tensorflow.plan")  # the package has its function under this name


@pytest.fixture
def variables():
    initial = tf.random.stateless_normal
    return [tf.Variable(initial(s, seed=(1, i)) / 8) for i, s in enumerate([(16, 64), (64, 64), (64, 1)])]


@pytest.fixture
def batch():
    return tf.random.stateless_normal((4096, 16), seed=(2, 0)), tf.ones((4096, 1))


@pytest.fixture
def room(monkeypatch, variables):
    """As much memory as one says, beside twice the variables."""
    keep = 2 * sum(4 * v.shape.num_elements() for v in variables)
    monkeypatch.setattr(planning, "RESERVE", 0.0)

    def room(size):
        monkeypatch.setattr(planning, "device_memory", lambda given: Memory(0, size + keep, "the test"))

    return room


def loss_of(variables):
    def loss_fn(part):
        x, y = part
        for w in variables[:-1]:
            x = tf.tanh(x @ w)
        return tf.reduce_mean((x @ variables[-1] - y) ** 2)

    return loss_fn


def same(a, b):
    pairs = zip(tf.nest.flatten(a), tf.nest.flatten(b), strict=True)
    return all(bool(tf.reduce_all(tf.equal(x, y))) for x, y in pairs)


def test_a_graph_by_hand():
    """Four tensors of 4,000 bytes: x is given, a and b live at once, c takes b's place."""

    @tf.function
    def function(x):
        a = tf.linalg.matvec(tf.ones((1000, 1)), x[:1]) * 2.0
        b = tf.cumsum(a)
        return tf.tanh(b), a

    found = peak(function.get_concrete_function(tf.TensorSpec((1000,))).graph)
    assert 8000 <= found <= 8100


def test_what_a_nested_function_takes_counts():
    @tf.function
    def inner(x):
        return tf.reduce_sum(tf.cumsum(tf.cumsum(x)))

    @tf.function
    def outer(x):
        return inner(x)

    spec = tf.TensorSpec((100000,))
    assert peak(outer.get_concrete_function(spec).graph) >= 800000


LOOPS = ["lstm", "gru", "while_loop", "scan", "map_fn", "cond"]


@pytest.mark.parametrize("name", ["lstm", "while_loop", "scan", "cond"])  # a process each; gru is lstm's, map_fn scan's
def test_what_a_loop_keeps_for_its_backward_pass_counts_once_a_step(name):
    """From 0.8 of what was measured to 2.3, where two lists share what they hold."""
    command = [sys.executable, str(Path(__file__).with_name("loops_peak.py")), name]
    # Tensors mapped one by one, so that the process holds what they hold, and no holes of the heap's.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    predicted, measured = map(int, done.stdout.split())
    assert 0.75 * measured < predicted < 3 * measured, (predicted, measured)


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
@pytest.mark.parametrize("how", ["constants", "computed", "nested function", "while inside while", "for in range"])
def test_a_loops_length_is_read_off_what_its_condition_reads(how, steps):
    """Each step keeps 4,000 bytes: the tanh, or its input."""
    bound = tf.reduce_max(tf.constant([steps, 0])) if how == "computed" else steps

    def body(i, h):
        return i + 1, tf.tanh(h)

    def loss(x):
        end = tf.reduce_max(tf.fill([3], steps)) if how == "computed" else bound
        if how == "for in range":
            for _ in tf.range(steps):
                x = tf.tanh(x)
            return tf.reduce_sum(x)
        if how == "while inside while":

            def outer(j, h):
                return (j + 1, tf.while_loop(lambda i, h: i < 3, body, (0, h))[1])

            return tf.reduce_sum(tf.while_loop(lambda j, h: j < end, outer, (0, x))[1])
        return tf.reduce_sum(tf.while_loop(lambda i, h: i < end, body, (0, x))[1])

    inner = tf.function(loss) if how == "nested function" else tf.autograph.to_graph(loss)

    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = inner(x)
        return tape.gradient(value, x)

    found = peak(gradient.get_concrete_function(tf.TensorSpec((1000,))).graph)
    kept = 4000 * steps * (3 if how == "while inside while" else 1)
    assert kept <= found <= 3 * kept + 40_000, (found, kept)


def test_a_loop_whose_length_depends_on_data_counts_as_run_once():
    @tf.function
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            h = tf.while_loop(lambda h: tf.reduce_sum(h) > 1, lambda h: tf.tanh(h / 2), (x,))[0]
        return tape.gradient(h, x)

    assert 4000 <= peak(gradient.get_concrete_function(tf.TensorSpec((1000,))).graph) <= 60_000


@pytest.mark.parametrize(("name", "graph"), [*[(name, False) for name in LOOPS], ("lstm", True), ("cond", True)])
def test_auto_with_a_loop_in_the_loss(name, graph, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import loops_peak

    loss, variables = loops_peak.losses(name)
    x = tf.random.stateless_normal([6, loops_peak.STEPS, loops_peak.INPUTS], [1, 2])
    with tf.GradientTape() as tape:
        right = loss(x)
    rights = tape.gradient(right, variables)

    def door(x):
        return bb.value_and_grad(loss, x, variables, micro_batch="auto")

    value, gradients = (tf.function(door) if graph else door)(x)
    np.testing.assert_allclose(value, right, rtol=1e-5)
    for got, expected in zip(gradients, rights, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * float(tf.norm(expected)) + 1e-9)
    assert bb.plan(loss, x, variables).micro_batch == 6


OUT_OF_MEMORY = [
    MemoryError("Unable to allocate 9.00 GiB for an array"),
    np._core._exceptions._ArrayMemoryError((9, 9), np.dtype(np.float64)),
    tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[9,9] and type float"),
    tf.errors.ResourceExhaustedError(None, None, "Out of memory while trying to allocate 9 bytes."),
    tf.errors.InternalError(None, None, "Failed to call cublasCreate: CUBLAS_STATUS_ALLOC_FAILED"),
    RuntimeError("std::bad_alloc"),
]
OTHER = [
    tf.errors.ResourceExhaustedError(None, None, "/tmp/log; No space left on device"),
    tf.errors.ResourceExhaustedError(None, None, "/tmp/data; Too many open files"),
    tf.errors.InternalError(None, None, "Blas GEMM launch failed"),
    ValueError("std::bad_alloc is what the other library said"),
    RuntimeError("out of memory budget for this user"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY + OTHER, ids=lambda e: f"{type(e).__name__}: {e}"[:40])
def test_what_counts_as_an_out_of_memory(error, variables, batch, caplog):
    """It is done again with half; whatever else is raised is raised on, and nothing is called twice."""
    batch, called, plain = tuple(leaf[:16] for leaf in batch), [], loss_of(variables)

    def loss_fn(part):
        if tf.executing_eagerly():
            called.append(part[0].shape[0])
            if len(called) == 1:
                raise error
        return plain(part)

    def door():
        return bb.value_and_grad(loss_fn, batch, variables, micro_batch="auto")

    if error in OUT_OF_MEMORY:
        loss, _ = door()
        assert called == [16, 8, 8]
        np.testing.assert_allclose(loss, plain(batch), rtol=1e-5)
    else:
        with pytest.raises(type(error)) as caught:
            door()
        assert caught.value is error
        assert called == [16]
    assert is_out_of_memory(error) == (error in OUT_OF_MEMORY)


def test_it_grows_with_the_micro_batch(variables, batch):
    traces = planning._Traces(loss_of(variables), batch, variables, tf.float32)
    small, large = traces.needs(64), traces.needs(2048)
    # x and what two tanh leave, 64 wide, for the backward, and up to two more at once there.
    assert 3 * 64 * 4 * 1984 <= large - small <= 6 * 64 * 4 * 1984


def test_what_fits_is_chosen(variables, batch, room):
    room(1 << 20)
    plan = bb.plan(loss_of(variables), batch, variables)
    assert plan.needs <= 1 << 20
    assert 100 < plan.micro_batch < 4096
    assert plan.how == "predicted from the traced graph"
    timed = bb.plan(loss_of(variables), batch, variables, time=True)
    assert sum(c.seconds is not None for c in timed.candidates) >= 3


@pytest.mark.parametrize("graph", [False, True])
def test_auto_is_that_micro_batch(variables, batch, room, graph, caplog):
    room(1 << 20)
    loss_fn = loss_of(variables)
    size = bb.plan(loss_fn, batch, variables).micro_batch

    def step(micro_batch):
        return lambda part: bb.value_and_grad(loss_fn, part, variables, micro_batch=micro_batch)

    auto, fixed = (tf.function(step(s)) if graph else step(s) for s in ("auto", size))
    assert same(auto(batch), fixed(batch))
    auto(batch)
    (record,) = caplog.records
    assert record.name == "bigbatch.tensorflow"
    assert record.getMessage().startswith(f'micro_batch="auto": micro_batch {size:,} of a batch of 4,096 (')
    auto(tuple(leaf[:1024] for leaf in batch))
    assert len(caplog.records) == 2


def test_a_method_is_remembered(variables, batch, caplog):
    class Trainer:
        def loss(self, part):
            return loss_of(variables)(part)

    trainer = Trainer()
    for _ in range(2):
        bb.value_and_grad(trainer.loss, batch, variables, micro_batch="auto")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_out_of_memory_costs_only_time(variables, batch, caplog, part, at):
    """With what BatchNorm does: a variable that every forward assigns. In a tf.function nothing can be caught."""
    batch = tuple(leaf[:16] for leaf in batch)
    moving, generator = tf.Variable(0.0, trainable=False), tf.random.Generator.from_seed(3)
    count, fails = [0], [None]

    def fault():
        count[0] += 1
        if count[0] == fails[0]:
            raise tf.errors.ResourceExhaustedError(None, None, "out of memory, as a test wants it")

    @tf.custom_gradient
    def faulty(x):
        if part == "forward" and tf.executing_eagerly():
            fault()

        def backward(g):
            if part == "backward" and tf.executing_eagerly():
                fault()
            return g

        return x, backward

    plain = loss_of(variables)

    def loss_fn(cut):
        x, y = cut
        moving.assign(0.9 * moving + tf.reduce_mean(x))
        kept = tf.cast(generator.uniform(tf.shape(x)) < 0.5, x.dtype)
        return plain((faulty(x * kept + variables[0][0, 0]), y))

    first = [v.numpy() for v in variables]

    def trained(micro_batch):
        """Two updates from the start."""
        moving.assign(0.0)
        generator.reset_from_seed(3)
        for v, value in zip(variables, first, strict=True):
            v.assign(value)
        for _ in range(2):
            loss, gradients = bb.value_and_grad(loss_fn, batch, variables, micro_batch=micro_batch)
            for v, gradient in zip(variables, gradients, strict=True):
                v.assign_sub(0.1 * gradient)
        return loss, [v.read_value() for v in variables], moving.read_value(), generator.state.read_value()

    trained("auto")
    (choice,) = planning._remembered[loss_fn].values()
    assert {id(v) for v in choice.assigned} == {id(moving), id(generator.state)}
    choice.micro_batch = 4
    count[0], fails[0] = 0, at
    found = trained("auto")
    fails[0] = None
    assert count[0] > 16
    assert same(found, trained(2))
    assert caplog.records[-1].getMessage() == (
        'micro_batch="auto": out of memory at 4; the window is run again with 2.'
    )


def test_bad_input(variables, batch, room):
    loss_fn = loss_of(variables)
    with pytest.raises(ValueError, match=r"memory must be a size or a fraction\. Received: memory='lots' \(str\)\."):
        bb.plan(loss_fn, batch, variables, memory="lots")
    with pytest.raises(ValueError, match=r"memory is too small for the model\. Received: memory=1 \(int\)\."):
        bb.plan(loss_fn, batch, variables, memory=1)
    room(1000)
    with pytest.raises(MemoryError, match="No micro-batch fits in memory"):
        bb.value_and_grad(loss_fn, batch, variables, micro_batch="auto")
    step = tf.function(
        lambda x, y: bb.value_and_grad(loss_fn, (x, y), variables, micro_batch="auto"),
        input_signature=[tf.TensorSpec([None, 16]), tf.TensorSpec([None, 1])],
    )
    with pytest.raises(ValueError, match="A plan needs the batch's length"):
        step(*batch)


def test_a_gpu_wants_a_size(variables, batch, monkeypatch):
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: ["GPU:0"])
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", lambda device: {"current": 1 << 20, "peak": 1 << 21})
    with pytest.raises(NotImplementedError, match="Pass memory as a size to plan"):
        bb.plan(loss_of(variables), batch, variables)
    plan = bb.plan(loss_of(variables), batch, variables, memory="4MiB")
    assert plan.budget.in_use == 1 << 20
    assert 100 < plan.micro_batch < 4096


def test_example(capsys, caplog):
    runpy.run_path(str(Path(__file__).parents[2] / "examples/tensorflow_auto.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if "loss" in line]
    assert losses[-1] < 0.6 < 2 < losses[0]
    chosen = [int(line.removeprefix("micro_batch=")) for line in lines if line.startswith("micro_batch=")]
    assert chosen[0] == 1024
    assert 1 < chosen[1] < 1024
    assert any("too large" in line for line in lines)
    assert all(record.getMessage().startswith('micro_batch="auto": micro_batch ') for record in caplog.records)
