"""The noise scale through `fit`: the right numbers, in both APIs, and nothing else moved."""

import csv
import importlib
import json
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

import bigbatch.keras as bb
from bigbatch.keras import noise_window
from bigbatch.noise import Noise
from conformance.keras_parity import BACKEND, close, data, float64, mlp

planning = importlib.import_module("bigbatch.keras.plan")  # the package has its function under this name

X, Y = data(14, units=1)
SIZES = [4, 4, 4, 2]
APIS = {"split": ({"micro_batch": 4}, 14), "stream": ({"every": 4}, 4)}
# Both APIs end in the same lines; where they are compiled one of them shows most things.
SHOWN = list(APIS)[: 2 if BACKEND == "torch" else 1]
OPTIONS = [{}, {"jit_compile": True}, {"run_eagerly": True}][: 3 if BACKEND == "tensorflow" else 1]


@pytest.fixture(autouse=True)
def _float64():
    float64()


def linear(optimizer=None, loss="mse", **options):
    """x·w, with w of ones, that stays where it is."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(optimizer or keras.optimizers.SGD(0.0), loss, **options)
    return model


def from_definition(contributions, sizes=SIZES):
    """From what each example adds to the window's mean gradient, of shape (examples, parameters)."""
    total, stops = sum(sizes), np.cumsum(sizes)
    parts = [total / n * contributions[stop - n : stop].sum(0) for n, stop in zip(sizes, stops, strict=True)]
    squares = sum(n * float(g @ g) for g, n in zip(parts, sizes, strict=True))
    mean = contributions.sum(0)
    return Noise.of(len(sizes), total, squares, float(mean @ mean))


def of_squares(x=X, y=Y, factor=1.0):
    """Each example's gradient of (factor·x·w − y)²."""
    return 2 * factor * (factor * x.sum(1, keepdims=True) - y) * x


def is_close(model, expected, windows=1, relative=1e-10):
    running = bb.noise_scale(model)
    assert running.windows == windows
    assert [running.trace, running.squared_norm] == pytest.approx([expected.trace, expected.squared_norm], rel=relative)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "".join(options) or "plain")
def test_a_window_says_what_every_gradient_by_itself_would(api, options):
    (how, size), model = APIS[api], linear(**options)
    logs = bb.accumulate(model, **how, noise=1).fit(X, Y, batch_size=size, shuffle=False, epochs=2, verbose=0).history
    is_close(model, from_definition(of_squares() / 14), windows=2)
    assert logs["noise_scale"] == pytest.approx([bb.noise_scale(model).scale] * 2)
    advice = bb.advice(bb.noise_scale(model), batch=14, micro_batch=4)
    assert advice.verdict in ("worth it", "past the knee", "wasteful", "not known")


@pytest.mark.parametrize("api", SHOWN)
def test_losses_that_count_different_things(api):
    """A weighted mean, a mean over examples and a sum; the noise is that of examples."""
    weight = np.random.default_rng(2).uniform(0.1, 3, 14)

    def make():
        x = keras.Input((4,))
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="a")
        a = dense(x)
        outputs = [a, keras.layers.Rescaling(2.0, name="b")(a), keras.layers.Rescaling(3.0, name="c")(a)]
        model = keras.Model(x, outputs)
        reductions = ("mean_with_sample_weight", "sum_over_batch_size", "sum")
        losses = [keras.losses.MeanSquaredError(reduction=reduction) for reduction in reductions]
        model.compile(keras.optimizers.SGD(0.0), losses, loss_weights=[1.0, 0.5, 0.01])
        return model

    ones = np.ones(14)
    how, size = APIS[api]
    model = bb.accumulate(make(), **how, noise=1)
    model.fit(X, [Y] * 3, sample_weight=[weight, ones, ones], batch_size=size, shuffle=False, verbose=0)
    contributions = (
        weight[:, None] / weight.sum() * of_squares()
        + 0.5 * of_squares(factor=2.0) / 14
        + 0.01 * of_squares(factor=3.0)
    )
    is_close(model, from_definition(contributions))


def test_with_the_micro_batch_that_fits(monkeypatch):
    """Where the micro-batches and the update are two programs."""
    monkeypatch.setattr(planning, "_planned", lambda *args: SimpleNamespace(micro_batch=4))
    model = bb.accumulate(linear(), micro_batch="auto", noise=2)
    logs = model.fit(X, Y, batch_size=14, shuffle=False, epochs=3, verbose=0).history
    is_close(model, from_definition(of_squares() / 14), windows=2)
    assert logs["noise_scale"] == pytest.approx([bb.noise_scale(model).scale] * 3)


def test_under_loss_scaling():
    scaling = [
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), initial_scale=8.0),
        keras.optimizers.SGD(0.0, loss_scale_factor=4.0),
    ]
    for optimizer in scaling[: 1 if BACKEND == "jax" else 2]:
        model = bb.accumulate(linear(optimizer), micro_batch=4, noise=1)
        model.fit(X, Y, batch_size=14, shuffle=False, verbose=0)
        is_close(model, from_definition(of_squares() / 14))


@pytest.mark.parametrize("api", SHOWN)
def test_the_updates_are_the_same(api):
    how, size = APIS[api]
    plain = bb.accumulate(mlp(), **how)
    logs = plain.fit(*data(42), batch_size=size, epochs=2, shuffle=False, verbose=0).history
    model = bb.accumulate(mlp(), **how, noise=2)
    ours = model.fit(*data(42), batch_size=size, epochs=2, shuffle=False, verbose=0).history
    close(model, plain, 1e-14)  # a compiler may order other sums where there is more to compute
    assert ours["loss"] == pytest.approx(logs["loss"], rel=1e-14)
    assert bb.noise_scale(model).windows == 3


def test_one_window_in_twenty_and_nothing_is_traced_again():
    traced = []

    def loss(y, y_pred):
        traced.append(1)
        return ops.mean(ops.square(y - y_pred), axis=-1)

    model = bb.accumulate(linear(loss=loss), micro_batch=4, noise=True)
    model.fit(X, Y, batch_size=14, shuffle=False, verbose=0)
    first = len(traced)
    model.fit(X, Y, batch_size=14, epochs=21, shuffle=False, verbose=0)
    assert bb.noise_scale(model).windows == 2
    assert BACKEND == "torch" or len(traced) == first


def test_it_is_in_the_logs_as_a_metric_of_training_is(tmp_path):
    class Seen(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.batches, self.asked = [], []

        def on_train_batch_end(self, batch, logs=None):
            self.batches.append(float(logs["noise_scale"]))
            self.asked.append(bb.noise_scale(self.model).scale)

    seen, path = Seen(), tmp_path / "log.csv"
    model = bb.accumulate(mlp(metrics=["mae"]), micro_batch=4, noise=1)
    logs = model.fit(
        *data(42), batch_size=14, epochs=2, validation_data=data(8), callbacks=[seen, keras.callbacks.CSVLogger(path)],
        verbose=0,
    ).history  # fmt: skip
    assert set(logs) == {"loss", "mae", "noise_scale", "val_loss", "val_mae"}
    assert len(seen.batches) == 6
    assert seen.batches == pytest.approx(seen.asked)
    assert logs["noise_scale"] == pytest.approx([seen.batches[2], seen.batches[5]])
    assert bb.noise_scale(model).windows == 6  # a new epoch does not begin it anew
    with path.open() as file:
        assert [float(row["noise_scale"]) for row in csv.DictReader(file)] == pytest.approx(logs["noise_scale"])
    assert len(model.evaluate(*data(8), verbose=0)) == 2
    assert list(model.evaluate(*data(8), verbose=0, return_dict=True)) == ["loss", "mae"]
    assert len(model.train_on_batch(*data(14))) == 3
    assert model.train_on_batch(*data(14), return_dict=True).keys() == {"loss", "mae", "noise_scale"}


def test_what_shows_no_noise():
    model = bb.accumulate(linear(), micro_batch=14, noise=1)
    model.fit(X, Y, batch_size=14, verbose=0)
    assert "no window held two micro-batches" in str(bb.noise_scale(model))
    zero = bb.accumulate(linear(), micro_batch=4, noise=1)
    zero.fit(0 * X, 0 * Y, batch_size=14, verbose=0)
    assert str(bb.noise_scale(zero)).startswith("none: the gradient is zero")


@pytest.mark.parametrize("api", SHOWN)
def test_a_window_of_nan_is_left_out(api):
    (how, size), model = APIS[api], linear()
    bb.accumulate(model, **how, noise=1)
    bad = np.where(np.arange(14)[:, None] == 5, math.nan, Y)
    model.fit(X, bad, batch_size=size, shuffle=False, verbose=0)
    assert bb.noise_scale(model).windows == 0
    model.fit(X, Y, batch_size=size, shuffle=False, verbose=0)
    is_close(model, from_definition(of_squares() / 14))


def test_without_it_nothing_is_there():
    model = mlp()
    names = [metric.name for metric in model.metrics]
    for given in ({}, {"noise": False}):
        bb.accumulate(model, micro_batch=4, noise=1)
        assert [metric.name for metric in model.metrics] == [*names, "noise_scale"]
        bb.accumulate(model, micro_batch=4, **given)
        assert [metric.name for metric in model.metrics] == names
        assert set(model.fit(*data(14), batch_size=14, verbose=0).history) == {"loss"}
    bb.accumulate(bb.accumulate(model, every=2, noise=True), None)
    assert [metric.name for metric in model.metrics] == names
    with pytest.raises(ValueError, match=r"The model measures no noise\. Pass noise=True"):
        bb.noise_scale(model)


@pytest.mark.parametrize("wrong", [0, -1, "yes", 1.5])
def test_bad_input(wrong):
    model = mlp()
    with pytest.raises(ValueError, match="noise must be True, False or an integer of at least 1"):
        bb.accumulate(model, micro_batch=4, noise=wrong)
    assert "fit" not in vars(model)


def test_a_saved_model_has_none_of_it(tmp_path):
    model = bb.accumulate(mlp(), micro_batch=4, noise=1)
    model.fit(*data(14), batch_size=14, verbose=0)
    model.save(tmp_path / "model.keras")
    assert "noise_scale" not in json.dumps(model.get_compile_config()) + model.to_json()
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [metric.name for metric in loaded.metrics] == ["loss"]
    close(loaded, model)


class Draws(keras.utils.PyDataset):
    """Rows of mean `gradient` and standard deviations `scales`, in pieces of these sizes, over and over."""

    def __init__(self, sizes, windows):
        super().__init__()
        self.sizes, self.windows = sizes, windows
        self.scales, self.gradient = np.linspace(0.5, 1.5, 200), math.sqrt(10 / 200)

    def __len__(self):
        return len(self.sizes) * self.windows

    def __getitem__(self, k):
        n = self.sizes[k % len(self.sizes)]
        rows = self.gradient + self.scales * np.random.default_rng(k).normal(size=(n, 200))
        return rows, np.zeros((n, 1))


WINDOWS, ALLOWED = (3000, 0.01) if BACKEND == "jax" else (250, 0.05)
CASES = {
    "equal": ({"micro_batch": 4}, [32]),
    "the last one short": ({"micro_batch": 4}, [30]),
    "ragged": ({"every": 8}, [1, 2, 3, 10, 4, 4, 6, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_monte_carlo(case, monkeypatch):
    """A loss whose gradient is the mean of the rows; the average looks back on all windows."""
    monkeypatch.setattr(noise_window, "DECAY", 1 - 1e-6)
    (how, sizes), keep = CASES[case], keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input((200,)), keep])
    model.compile(keras.optimizers.SGD(0.0), lambda y, y_pred: y_pred[:, 0])
    draws = Draws(sizes, WINDOWS)
    bb.accumulate(model, **how, noise=1).fit(draws, shuffle=False, verbose=0)
    running = bb.noise_scale(model)
    assert running.windows == WINDOWS
    assert abs(running.trace / np.square(draws.scales).sum() - 1) < ALLOWED
    assert abs(running.squared_norm / 10 - 1) < ALLOWED
