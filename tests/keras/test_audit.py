"""`audit` in Keras on models whose truth is known, and what it leaves as it was."""

import random
import runpy
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import bigbatch.keras as bb
from bigbatch.keras.audit import AuditRunner
from conformance.keras_driver import array
from conformance.keras_parity import BACKEND, data, float64

from . import zoo

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _float64():
    float64()


def said(found):
    return found.exact, {cause.kind: cause.where for cause in found.causes}


# All of it on PyTorch, where nothing is compiled; elsewhere one of each kind, for the experiments know no backend.
EVERYWHERE = ("tokens_with_weights", "dropout", "batch_normalization", "a_sum_added")
ZOO = [specimen for specimen in zoo.ZOO if BACKEND == "torch" or specimen.name in EVERYWHERE]


@pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
def test_the_zoo(specimen):
    model, given = specimen.make()
    before = [array(v) for v in model.variables]
    found = bb.audit(model, *given, micro_batch=zoo.MICRO_BATCH)
    assert said(found) == (specimen.exact, specimen.causes), found
    assert found.dtype == "float64"
    for v, value in zip(model.variables, before, strict=bool(before)):  # moving statistics and seeds among them
        np.testing.assert_array_equal(array(v), value)
    assert [p.name for p in found.parameters] == [v.path for v in model.trainable_variables]
    assert not any("items)" in cause.remedy for cause in found.causes)  # fit has no loss function that returns them
    assert ("layer.trainable = False" in str(found)) == ("module" in specimen.causes)
    assert found.verdict.startswith("exact" if specimen.exact else "not exact: ")


def test_it_is_what_a_window_does():
    """The accumulated gradient is the update of a plain SGD, in either state of things."""
    for make in (zoo.tokens_with_weights, zoo.batch_normalization)[: 2 if BACKEND == "torch" else 1]:
        model, given = make()
        model._symbolic_build(data_batch=tuple(map(ops.convert_to_tensor, given)))
        bench = AuditRunner(model, given, zoo.N, zoo.MICRO_BATCH)
        parts = [range(i, min(i + zoo.MICRO_BATCH, zoo.N)) for i in range(0, zoo.N, zoo.MICRO_BATCH)]
        expected = bench.gradient(parts, seed=0, quiet=frozenset())
        before = {v.path: array(v) for v in model.trainable_variables}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the BatchNormalization
            bb.accumulate(model, micro_batch=zoo.MICRO_BATCH).train_on_batch(*given)
        for v in model.trainable_variables:
            np.testing.assert_allclose(before[v.path] - array(v), 0.1 * expected[v.path], rtol=1e-9, atol=1e-12)


def everything(model):
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    chance = random.getstate(), np.random.get_state()[1].tolist()
    return [array(v).tolist() for v in variables], chance, [layer.trainable for layer in model._flatten_layers()]


@pytest.mark.parametrize("error", [True] if BACKEND == "jax" else [True, False])
def test_everything_is_left_as_it_was(error):
    model = zoo.stack(layers.BatchNormalization(), layers.Dropout(0.3), zoo.MeanOfSquares(), metrics=["accuracy"])
    with pytest.warns(UserWarning, match="BatchNormalization"):
        bb.accumulate(model, micro_batch=4).train_on_batch(*zoo.examples())
    train_function, attributes = model.train_function, set(vars(model))
    before, drawn = everything(model), array(keras.random.normal((2,)))
    keras.utils.set_random_seed(7)
    expected = array(keras.random.normal((2,)))
    if error:
        calls = []

        def fails(**given):
            calls.append(1)
            if len(calls) == 2:
                raise KeyError("mine")
            return type(model).compute_loss(model, **given)

        model.compute_loss = fails
    keras.utils.set_random_seed(7)
    before = everything(model)
    if error:
        with pytest.raises(KeyError, match="mine"):
            bb.audit(model, *zoo.examples(), micro_batch=4)
        del model.compute_loss
    else:
        bb.audit(model, *zoo.examples(), micro_batch=4)
    assert everything(model) == before
    assert drawn.shape == (2,)
    np.testing.assert_array_equal(array(keras.random.normal((2,))), expected)
    assert model.train_function is train_function
    assert set(vars(model)) == attributes
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    model.train_on_batch(*zoo.examples())


def test_a_model_that_is_not_built_is_built():
    model = keras.Sequential([layers.Dense(3)])
    model.compile("sgd", "mse")
    assert bb.audit(model, *data(), micro_batch=4).exact
    assert model.built


def test_no_layer_but_the_loss_draws():
    class Noisy(keras.Model):
        def __init__(self):
            super().__init__()
            self.last, self.seeds = layers.Dense(zoo.CLASSES), keras.random.SeedGenerator(1)

        def call(self, x):
            return self.last(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            noise = keras.random.normal(ops.shape(y_pred), stddev=0.3, seed=self.seeds)
            return ops.mean(zoo.each(y, y_pred + ops.cast(noise, y_pred.dtype)))

    model = Noisy()
    model.compile("sgd")
    found = bb.audit(model, *zoo.examples(), micro_batch=4)
    assert said(found) == (True, {"stochastic": ()}), found
    assert found.verdict.endswith("apart from randomness")


if BACKEND != "jax":  # where a loss is traced once, and remembers nothing

    def test_a_loss_that_remembers_is_not_deterministic():
        calls = []

        def compute(x, y, y_pred):
            calls.append(1)
            return ops.mean(zoo.each(y, y_pred)) * len(calls)

        found = bb.audit(zoo.own(compute), *zoo.examples(), micro_batch=4)
        assert said(found) == (False, {"not deterministic": ()})


def not_compiled():
    return keras.Sequential([keras.Input((6,)), layers.Dense(4)])


def frozen():
    model = zoo.stack()
    model.trainable = False
    return model


X, Y = zoo.examples()
NAN = np.where(np.arange(zoo.N)[:, None] == 3, np.nan, X)


@pytest.mark.parametrize(
    ("make", "given", "kind", "words"),
    [
        (zoo.stack, {"micro_batch": 0}, ValueError, "micro_batch must be at least 1"),
        (zoo.stack, {"micro_batch": 14}, ValueError, "An audit needs more than one micro-batch"),
        (zoo.stack, {"y": Y[:3]}, ValueError, "The leaves of a batch must have the same length"),
        (zoo.stack, {"x": NAN}, ValueError, "The loss is not a number. Received: loss=nan over the whole batch"),
        (not_compiled, {}, ValueError, r"You must call `compile\(\)` before calling `audit\(\)`"),
        (frozen, {}, ValueError, "does not have any trainable weights"),
        (lambda: 3, {}, TypeError, r"model must be a keras.Model. Received: model=3 \(int\)"),
        (lambda: zoo.own(lambda x, y, y_pred: y_pred), {}, ValueError, "The loss must be a scalar"),
        (lambda: zoo.own(lambda x, y, y_pred: ops.mean(x)), {}, ValueError, "The loss needs no gradient"),
    ],
)
def test_bad_input(make, given, kind, words):
    given = {"x": X, "y": Y, "micro_batch": 4, **given}
    with pytest.raises(kind, match=words):
        bb.audit(make(), given.pop("x"), given.pop("y"), **given)


if BACKEND == "torch":

    @pytest.mark.parametrize("name", ["a_compute_loss_that_is_a_sum", "a_masked_lstm", "batch_normalization"])
    def test_in_float32_as_keras_comes(name):
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        specimen = next(one for one in zoo.ZOO if one.name == name)
        model, given = specimen.make()
        found = bb.audit(model, *given, micro_batch=zoo.MICRO_BATCH)
        assert said(found) == (specimen.exact, specimen.causes), found
        assert (found.dtype, found.tolerance) == ("float32", 1e-4)

    def test_in_half_precision():
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("mixed_float16")
        found = bb.audit(zoo.stack(), *zoo.examples(), micro_batch=4)
        assert (found.dtype, found.exact) == ("float16", True), found

    def test_the_example(capsys):
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")
        runpy.run_path(str(ROOT / "examples/keras_honest.py"))
        lines = capsys.readouterr().out
        assert "not exact: " in lines
        assert "\nexact to " in lines
        assert "noise scale: " in lines
