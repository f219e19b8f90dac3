"""What a window counts: sample weights that are none, windows without any, and counts in float64."""

import keras
import numpy as np
import pytest
from keras import ops

import bigbatch.keras as bb
from bigbatch.keras import skipped
from bigbatch.skipped import BAD_ITEMS, NO_ITEMS
from conformance.keras_driver import array
from conformance.keras_parity import BACKEND, close, data, float64, mlp

METHODS = (({"micro_batch": 4}, 12), ({"every": 3}, 4))


@pytest.fixture(autouse=True)
def _float64():
    float64()


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr(skipped.logger, "warning", texts.append)
    return texts


def weighted(**options):
    loss = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    return mlp(loss, optimizer=keras.optimizers.AdamW(0.1, weight_decay=0.1), **options)


def fit(model, weight, size):
    x, y = data(len(weight))
    model.fit(x, y, sample_weight=weight, batch_size=size, shuffle=False, verbose=0)
    # What is said on JAX is said when the device comes to it.
    return [array(v) for v in [*model.trainable_variables, *model.optimizer.variables]]


BAD = {"negative": -1.0, "nan": float("nan"), "inf": float("inf")}
NO_WEIGHT = f"A window made no update: {BAD_ITEMS}. Sample weights are the items here."
NO_WEIGHTS = f"A window made no update: {NO_ITEMS}. The weights of all its examples are 0."


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("method", METHODS)
def test_a_window_with_what_is_no_weight_makes_no_update_and_says_so(said, bad, method):
    """Also a negative one that another cancels, so that the sum shows nothing."""
    options, size = method
    weight = np.ones(24)
    weight[5:7] = BAD[bad], 1
    ours = fit(bb.accumulate(weighted(), **options), weight, size)
    assert said == [NO_WEIGHT]
    plain = weighted()
    x, y = data(24)
    plain.train_on_batch(x[12:], y[12:], weight[12:])
    for a, b in zip(ours, [array(v) for v in [*plain.trainable_variables, *plain.optimizer.variables]], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_window_without_weight_makes_no_update_and_says_why(said, method, scaled):
    options, size = method
    model = weighted()
    if scaled:
        model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.AdamW(0.1)), model.loss)
    model.optimizer.build(model.trainable_variables)
    bb.accumulate(model, **options)
    start = [array(v) for v in [*model.trainable_variables, *model.optimizer.variables]]
    ended = fit(model, np.zeros(12), size)
    assert said == [NO_WEIGHTS]
    assert all(np.array_equal(a, b) for a, b in zip(ended, start, strict=True))
    weight = np.ones(12)
    weight[:4] = 0  # a micro-batch without weight is none
    fit(model, weight, size)
    assert said == [NO_WEIGHTS]
    assert int(array(getattr(model.optimizer, "inner_optimizer", model.optimizer).iterations)) == 1


def test_negative_weights_that_count_nothing_are_the_plain_updates(said):
    """With Keras's default reduction weights only scale, as advantages in reinforcement learning do."""
    weight = np.linspace(-2, 3, 12)
    plain = mlp()
    fit(plain, weight, 12)
    for options, size in METHODS:
        ours = bb.accumulate(mlp(), **options)
        fit(ours, weight, size)
        close(ours, plain)
    assert said == []


class Squares(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return ops.sum((y_true - y_pred) * (y_true - y_pred), axis=-1)


class Own(keras.Model):
    """A linear model. Like its loss it has none of the operations that Keras computes in float32 even then."""

    def __init__(self):
        super().__init__()
        self.w = self.add_weight(shape=(4, 3), initializer=keras.initializers.Constant(0.3))

    def call(self, x):
        return ops.sum(x[:, :, None] * self.w[None], axis=1)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean", "mean_with_sample_weight", "sum"])
def test_float64_is_counted_in_float64(monkeypatch, reduction):
    """In windows of Keras as it is; the other tests keep it from computing in float32 on PyTorch and JAX."""
    from keras.src.backend.common import dtypes

    if BACKEND != "tensorflow":
        monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float32")
    x, y = data(22)
    weight = np.random.default_rng(3).uniform(0.1, 3, 22)
    for options, size in (({"micro_batch": 5}, 22), ({"every": 6}, 4)):
        model = Own()
        model.compile(keras.optimizers.SGD(1.0), Squares(reduction=reduction))
        model.build((None, 4))
        start = array(model.w)
        bb.accumulate(model, **options)
        model.fit(x, y, sample_weight=weight, batch_size=size, shuffle=False, verbose=0)
        over = {"mean_with_sample_weight": weight.sum(), "sum": 1}.get(reduction, 22)
        gradient = x.T @ (weight[:, None] * 2 * (x @ start - y)) / over
        expected = start - gradient
        assert np.abs(array(model.w) - expected).max() < 1e-14 * np.abs(gradient).max() * 22
