"""micro_batch="auto" and plan: read off the traced graph, once for each shape; an out-of-memory costs only time."""

import runpy
from pathlib import Path

import pytest
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.engines.tensorflow_graph import peak
from bigbatch.host import Memory
from bigbatch.tensorflow import memory


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
    monkeypatch.setattr(memory, "RESERVE", 0.0)

    def room(size):
        monkeypatch.setattr(memory, "device_memory", lambda given: Memory(0, size + keep, "the test"))

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


def test_it_grows_with_the_micro_batch(variables, batch):
    traces = memory._Traces(loss_of(variables), batch, variables, tf.float32)
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
    (choice,) = memory._remembered[loss_fn].values()
    assert {id(v) for v in choice.assigned} == {id(moving), id(generator.state)}
    choice.micro_batch = 4
    count[0], fails[0] = 0, at
    found = trained("auto")
    fails[0] = None
    assert count[0] > 16
    assert same(found, trained(2))
    assert caplog.records[-1].getMessage() == (
        'micro_batch="auto": out of memory at 4; the window is done again with 2.'
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
    assert plan.budget.held == 1 << 20
    assert 100 < plan.micro_batch < 4096


def test_example(capsys, caplog):
    runpy.run_path(str(Path(__file__).parents[2] / "examples/tensorflow_auto.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if "loss" in line]
    assert losses[-1] < 0.6 < 2 < losses[0]
    assert "micro_batch=1024" in lines
    assert all(record.getMessage().startswith('micro_batch="auto": micro_batch ') for record in caplog.records)
