"""micro_batch="auto" and plan: predicted and not tried, once for each shape; an out-of-memory costs only time."""

import importlib
import logging
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

import bigbatch.keras as bb
from bigbatch.host import Memory
from conformance.keras_driver import BACKEND, array

planning = importlib.import_module("bigbatch.keras.plan")  # the package has its function under this name

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "peak_of_a_window.py"
Predictions = planning.planner().Predictions
HOW = {
    "tensorflow": "predicted from the traced graph", "jax": "by the compiler's memory analysis of ",
    "torch": "predicted from fake tensors",
}[BACKEND]  # fmt: skip


@pytest.fixture(autouse=True)
def _float32():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def free_memory(monkeypatch):
    """As much memory as one says."""

    def free_memory(size):
        free = lambda self, given: Memory(0, math.ceil(size / (1 - self.reserve)) + 1, "the test")  # noqa: E731
        monkeypatch.setattr(Predictions, "device_memory", free)

    return free_memory


@pytest.fixture
def planned_for(monkeypatch):
    """The micro-batch that is planned, whatever is needed."""

    def planned_for(most):
        whole = planning.choose

        def choose(needs, *args, **kwargs):
            needs(min(args[0], most))  # as it would be asked
            needed = lambda size: 1 << 62 if size > most else 1  # noqa: E731
            return whole(needed, *args, **{**kwargs, "enough": 9e9, "tries": 99})

        monkeypatch.setattr(planning, "choose", choose)

    return planned_for


def mlp(*layers, hidden=2, **options):
    """The same weights each time; `layers` are made by functions of nothing."""
    keras.utils.set_random_seed(0)
    dense = [keras.layers.Dense(64, activation="tanh") for _ in range(hidden)]
    model = keras.Sequential([keras.Input((16,)), *dense, *[make() for make in layers], keras.layers.Dense(1)])
    model.compile(
        **{"optimizer": keras.optimizers.SGD(0.1, momentum=0.9), "loss": "mse", "metrics": ["mae"], **options}
    )
    return model


def data(length=4096, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(length, 16)).astype("float32"), rng.normal(size=(length, 1)).astype("float32")


def held(model):
    """All that training changes, bit by bit."""
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return {f"{i} {re.sub('_?[0-9]+', '', v.path)}": array(v) for i, v in enumerate(variables)}


def said(caplog):
    """What the log of ours has, without JAX's own."""
    return [record.getMessage() for record in caplog.records if record.name == "bigbatch.keras"]


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_it_grows_with_the_micro_batch():
    predictions = Predictions(mlp(), data())
    small, large = predictions.needs(128), predictions.needs(2048)
    # What two tanh leave, 64 wide, for the backward; and there, and in the cut, up to as much again.
    assert 1.5 * 64 * 4 * 1920 <= large - small <= 6 * 64 * 4 * 1920


def test_what_fits_is_chosen(free_memory):
    free_memory(2 << 20)
    model = mlp()
    plan = bb.plan(model, *data())
    assert 1 << 20 < plan.needs <= 2 << 20
    assert 100 < plan.micro_batch < 4096
    assert plan.how.startswith(HOW)
    if BACKEND == "jax":
        assert len(plan.candidates) <= 6, "each is a compilation"


def test_it_takes_what_fit_takes():
    model, (x, y) = mlp(), data(300)
    assert bb.plan(model, x.astype("float64"), y, np.ones(300), batch_size=500, memory=0.5).batch == 300
    batches = keras.utils.PyDataset()
    batches.__class__ = type("Batches", (keras.utils.PyDataset,), {"__len__": lambda self: 2,
                             "__getitem__": lambda self, i: (x[:64], y[:64])})  # fmt: skip
    assert bb.plan(model, batches, memory=0.5).batch == 64


def test_planning_changes_nothing():
    model = mlp(keras.layers.BatchNormalization, lambda: keras.layers.Dropout(0.5))
    model.train_on_batch(*data(4))
    before, random = held(model), _random_state()
    grads = [p.grad for p in model.parameters()] if BACKEND == "torch" else []
    plan = bb.plan(model, *data(4), memory=0.5, time=True)
    assert [c.micro_batch for c in plan.candidates if c.seconds is not None] == [1, 2, 4]
    assert plan.micro_batch == min(plan.candidates, key=lambda c: c.seconds_per_example).micro_batch
    same(held(model), before)
    assert _random_state() == random
    if BACKEND == "torch":
        assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


def _random_state():
    if BACKEND != "torch":
        return None  # all of it is in variables
    import torch

    return torch.get_rng_state().tolist()


def test_auto_is_that_micro_batch_planned_once_for_each_shape(planned_for, caplog):
    planned_for(400)
    x, y = data(2500)
    options = {"batch_size": 1024, "epochs": 2, "verbose": 0}
    auto = bb.accumulate(mlp(), micro_batch="auto")
    for _ in range(2):
        auto.fit(x, y, **options)  # the ragged last batch goes by the plan for the others
    (record,) = (record for record in caplog.records if record.name == "bigbatch.keras")
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith('micro_batch="auto": micro_batch 342 of a batch of 1,024 (3 micro-batches)')
    auto.train_on_batch(x, y)
    assert len(said(caplog)) == 2, "a larger batch is planned anew"
    auto.compile("sgd", "mse")
    auto.train_on_batch(x[:8], y[:8])
    assert len(said(caplog)) == 3, "and so is what was compiled again"


def test_longer_inputs_are_planned_anew(caplog):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((None, 4)), keras.layers.Dense(8), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
    )
    model.compile("sgd", "mse")
    bb.accumulate(model, micro_batch="auto")
    for steps in (3, 5, 3, 5):
        model.train_on_batch(np.ones((8, steps, 4), "float32"), np.ones((8, 1), "float32"))
    assert len(said(caplog)) == 2


def test_auto_is_the_fixed_size_bit_for_bit(planned_for):
    """Weights, a regularizer, several losses of one batch, metrics, a scaled loss: all that a window adds up."""

    def run(micro_batch):
        model = mlp(
            lambda: keras.layers.Dense(8, kernel_regularizer="l2"), lambda: keras.layers.Dropout(0.3),
            optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2)), weighted_metrics=["mse"],
        )  # fmt: skip
        bb.accumulate(model, micro_batch=micro_batch)
        weights = np.linspace(0, 1, 24, dtype="float32")
        logs = model.fit(*data(24), sample_weight=weights, batch_size=12, epochs=2, shuffle=False, verbose=0).history
        return {**held(model), **logs}

    planned_for(4)
    same(run("auto"), run(4))


if BACKEND != "torch":  # where Keras takes one step in a call

    def test_several_steps_in_one_call(planned_for):
        planned_for(4)
        found = []
        for steps in (1, 3):
            model = bb.accumulate(mlp(steps_per_execution=steps), micro_batch="auto")
            logs = model.fit(*data(56), batch_size=8, shuffle=False, verbose=0).history
            found.append({**held(model), **logs})
        same(*found)


def test_eagerly_too(planned_for):
    planned_for(4)
    model = mlp(run_eagerly=True, hidden=1)
    plain = bb.accumulate(mlp(run_eagerly=True, hidden=1), micro_batch=4)
    for each in (bb.accumulate(model, micro_batch="auto"), plain):
        each.train_on_batch(*data(8))
    for name, value in held(plain).items():
        np.testing.assert_allclose(held(model)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


class Fault:
    """Runs out of memory at one micro-batch's forward or backward, as the framework itself would say it."""

    def __init__(self):
        self.part, self.at, self.count = "forward", None, 0

    def __call__(self, x=None):
        self.count += 1
        if self.count == self.at:
            raise self.error()
        return x

    def error(self):
        said = "Out of memory, as a test wants it"
        if BACKEND == "torch":
            import torch

            return torch.OutOfMemoryError(said)
        # What XLA and TensorFlow make of an error of Python's inside a program.
        return MemoryError(said) if BACKEND == "tensorflow" else RuntimeError("RESOURCE_EXHAUSTED: " + said)

    def around(self, x):
        """x, by an operation that fails."""
        return getattr(self, BACKEND)(x)

    def torch(self, x):
        import torch

        def is_there(x):
            return type(x) is torch.Tensor and not x.is_meta

        class Faulty(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                if self.part == "forward" and is_there(x):
                    self()
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                if self.part == "backward" and is_there(g):
                    self()
                return g

        return Faulty.apply(x)

    def jax(self, x):
        import jax

        def called(x, part):
            return jax.pure_callback(self, jax.ShapeDtypeStruct(x.shape, x.dtype), x) if self.part == part else x

        @jax.custom_vjp
        def faulty(x):
            return called(x, "forward")

        faulty.defvjp(lambda x: (faulty(x), None), lambda _, g: (called(g, "backward"),))
        return faulty(x)

    def tensorflow(self, x):
        import tensorflow as tf

        def called(x, part):
            if self.part != part:
                return x
            return tf.ensure_shape(tf.numpy_function(self, [x], x.dtype), x.shape)

        @tf.custom_gradient
        def faulty(x):
            return called(x, "forward"), lambda g: called(g, "backward")

        return faulty(x)


class Faulty(keras.layers.Layer):
    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def call(self, x):
        return self.fault.around(x)

    def compute_output_spec(self, x):
        return keras.KerasTensor(x.shape, x.dtype)


class Training:
    """A model with dropout and BatchNorm that measures its noise, and two updates on batches of 24."""

    def __init__(self, fault, micro_batch):
        normalize, drop = keras.layers.BatchNormalization, lambda: keras.layers.Dropout(0.3)
        self.fault, self.model = fault, mlp(normalize, lambda: Faulty(fault), drop)
        bb.accumulate(self.model, micro_batch=micro_batch, noise=2)
        self.model.train_on_batch(*data(24))
        self.variables = [*self.model.variables, *self.model.optimizer.variables, *self.model.metrics_variables]
        self.start = [array(v) for v in self.variables]

    def run(self, at=None):
        """All that comes of it from the same start, bit by bit."""
        for v, value in zip(self.variables, self.start, strict=True):
            v.assign(value.astype(v.dtype))
        keras.utils.set_random_seed(0)
        self.fault.count, self.fault.at = 0, at
        logs = self.model.fit(*data(48), batch_size=24, shuffle=False, verbose=0).history
        return {**held(self.model), **logs}


@pytest.mark.filterwarnings("ignore:BatchNormalization normalizes over each micro-batch")
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_out_of_memory_costs_only_time(planned_for, caplog, monkeypatch, part):
    fittings, fault = [], Fault()
    auto = planning.AutoMicroBatch
    monkeypatch.setattr("bigbatch.keras.split.AutoMicroBatch", lambda: fittings.append(auto()) or fittings[-1])
    fault.part = part
    planned_for(8)
    auto = Training(fault, "auto")
    (((choice, _),),) = (lengths.values() for lengths in fittings[0].choices.values())
    choice.micro_batch = 4
    expected = auto.run()
    assert fault.count == 12
    for at in (1, 2, 3):
        choice.micro_batch = 8
        caplog.clear()
        same(auto.run(at), expected)
        assert fault.count == at + 12, "and it stays with what fits"
        assert said(caplog) == ['micro_batch="auto": out of memory at 8; the window is run again with 4.']
    choice.micro_batch = 8
    unlike = auto.run()
    assert any(not np.array_equal(unlike[name], expected[name]) for name in expected), "or the test could not fail"


class Failing(keras.optimizers.Optimizer):
    def __init__(self, fault):
        super().__init__(1e-2)
        self.fault = fault

    def update_step(self, gradient, variable, learning_rate):
        self.assign_sub(variable, self.fault.around(gradient) * learning_rate)


def test_the_update_is_not_in_it(planned_for):
    """An out-of-memory of the optimizer's is the user's: half an update cannot be taken back."""
    planned_for(8)
    window, update = Fault(), Fault()
    model = bb.accumulate(mlp(lambda: Faulty(window), optimizer=Failing(update)), micro_batch="auto")
    model.train_on_batch(*data(24))
    window.count, update.count, update.at = 0, 0, 1
    with pytest.raises(Exception, match=r"(?i)out of memory"):
        model.train_on_batch(*data(24))
    assert window.count == 3, "or the window was done again"


def test_not_even_one_example(planned_for, caplog):
    class Always(Fault):
        def __call__(self, x=None):
            self.at = self.count + 1
            return super().__call__(x)

    planned_for(8)
    model = bb.accumulate(mlp(lambda: Faulty(Always())), micro_batch="auto")
    before = array(model.layers[0].kernel)
    with pytest.raises(Exception, match=r"(?i)out of memory") as caught:
        model.fit(*data(8), batch_size=8, verbose=0)
    assert planning.planner().is_out_of_memory(caught.value)
    assert caught.value.__notes__[-1].startswith('micro_batch="auto": not even one example at a time fits. Planned was')
    assert [line.split(": ")[1][:16] for line in said(caplog)[1:]] == ["out of memory at"] * 3
    np.testing.assert_array_equal(array(model.layers[0].kernel), before)


def test_other_errors_are_not_caught(planned_for):
    class Mistake(Fault):
        def error(self):
            return ValueError("a mistake")

    planned_for(8)
    fault = Mistake()
    model = bb.accumulate(mlp(lambda: Faulty(fault)), micro_batch="auto")
    fault.count, fault.at = 0, 2
    with pytest.raises(Exception, match="a mistake"):
        model.train_on_batch(*data(24))
    assert fault.count < 4


@pytest.mark.parametrize("given", ["lots", -1, 2.0, "900TiB"])
def test_a_budget_without_sense(given):
    with pytest.raises(ValueError, match=r"^memory must .* Received: memory="):
        bb.plan(mlp(), *data(8), memory=given)


def test_bad_input(free_memory, monkeypatch):
    model, (x, y) = mlp(), data(8)
    with pytest.raises(TypeError, match=r"^memory must be a size or a fraction\. Received: memory=\[1\] \(list\)"):
        bb.plan(model, x, y, memory=[1])
    with pytest.raises(TypeError, match=r"model must be a keras\.Model"):
        bb.plan(x, y)
    with pytest.raises(ValueError, match=r"You must call `compile\(\)` before calling `plan\(\)`\."):
        bb.plan(keras.Sequential([keras.layers.Dense(1)]), x, y)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        bb.plan(model, x, y, batch_size=0)
    with pytest.raises(ValueError, match="The leaves of a batch must have the same length"):
        bb.plan(model, x, y[:7])
    with pytest.raises(TypeError, match="micro_batch must be an integer"):
        bb.accumulate(model, micro_batch="automatic")
    free_memory(1000)
    x, y = data(2)
    with pytest.raises(MemoryError, match="No micro-batch fits in memory"):
        bb.accumulate(model, micro_batch="auto").train_on_batch(x, y)
    with pytest.raises(ValueError, match=r"^memory is too small for the model\. Received: memory=1000 \(int\)\."):
        bb.plan(model, x, y, memory=1000)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: SimpleNamespace())
    for call in (lambda: bb.plan(model, x, y), lambda: bb.accumulate(model, micro_batch="auto")):
        with pytest.raises(ValueError, match=r'^micro_batch="auto" is not planned across devices yet'):
            call()


def test_the_fixed_size_comes_back():
    model = bb.accumulate(mlp(), micro_batch="auto")
    model.train_on_batch(*data(8))
    planned = model.__dict__["make_train_function"]
    for options in ({"micro_batch": 4}, {"every": 2}, {"micro_batch": None}):
        bb.accumulate(model, **options)
        made = model.__dict__.get("make_train_function")
        assert made is not planned
        assert (made is None) == (options == {"micro_batch": None})
        model.train_on_batch(*data(8))


def test_losses_that_layers_add_are_let_go():
    class Adds(keras.layers.Layer):
        def call(self, x):
            self.add_loss(ops.mean(x))
            return x

    assert bb.plan(mlp(Adds), *data(64), memory=0.5).how.startswith(HOW)


if BACKEND == "torch":

    def test_a_model_that_asks_for_values_is_measured_on_few_examples():
        model = mlp(lambda: keras.layers.Dropout(0.5, seed=1), keras.layers.BatchNormalization)
        model.train_on_batch(*data(64))
        before, random = held(model), _random_state()
        plan = bb.plan(model, *data(512), memory=0.5)
        assert plan.how.startswith(
            "a straight line through runs on 4 and 8 examples, as the model takes no fake tensors (Data"
        )
        same(held(model), before)
        assert _random_state() == random
        exact = bb.plan(mlp(lambda: keras.layers.Dropout(0.5), keras.layers.BatchNormalization), *data(512), memory=0.5)
        assert plan.needs == pytest.approx(exact.needs, rel=0.3)


@pytest.mark.parametrize(("model", "micro_batch"), [("mlp", 6000), ("convnet", 300)])
def test_predicted_against_the_process(model, micro_batch):
    """Of more than 100 MiB, in a process of its own: to 15 % where a compiler tells, else to the reserve."""
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, str(WORKER), model, str(micro_batch), "2"]
    said = subprocess.run(command, capture_output=True, env=environment, text=True, check=True).stdout.split()
    needs, measured = map(float, said[:2])
    assert measured > 100 * 2**20
    # What PyTorch's kernels take inside differs between CPUs: 131 MB predicted, 154 measured on an Intel by code that
    # was within 15 % on an AMD. JAX's compiler says all that it takes.
    assert needs == pytest.approx(measured, rel=0.15 if BACKEND == "jax" else 0.25)


def test_example(capsys, caplog):
    runpy.run_path(str(ROOT / "examples/keras_auto.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if "loss" in line]
    assert losses[-1] < 0.6 < 2 < losses[0]
    assert lines[-1] == "micro_batch=1024"
    tight = [int(line.removeprefix("micro_batch=")) for line in lines if line.startswith("micro_batch=")][1]
    assert 1 < tight < 1024
    assert all(line.startswith('micro_batch="auto": micro_batch ') for line in said(caplog))
