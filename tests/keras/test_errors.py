"""What a user is told, with the weights as they were."""

import ast
import warnings
from importlib import import_module

import keras
import numpy as np
import pytest

import bigbatch.keras as bb
from conformance.keras_driver import array
from conformance.keras_parity import data, float64, mlp
from conformance.laws import STREAM_WORDS, WORDS


@pytest.fixture(autouse=True)
def _float64():
    float64()


@pytest.mark.parametrize("mistake", sorted(STREAM_WORDS))
def test_the_streams_words(mistake):
    kind, text = WORDS[mistake]
    name, written = mistake.split("=")
    value = float("nan") if written == "nan" else ast.literal_eval(written)
    with pytest.raises(kind) as error:
        bb.items(value) if name == "items" else bb.accumulate(mlp(), every=value)
    assert str(error.value) == text


@pytest.mark.parametrize("given", [{}, {"micro_batch": 2, "every": 2}])
def test_one_of_micro_batch_and_every(given):
    model = mlp()
    with pytest.raises(ValueError, match=r"Pass one of micro_batch and every\. Received: (neither|.'micro_batch': 2)"):
        bb.accumulate(model, **given)
    assert "fit" not in vars(model)


def test_not_a_model():
    with pytest.raises(TypeError, match=r"model must be a keras.Model. Received: model=3 \(int\)."):
        bb.accumulate(3, every=2)


def test_a_train_step_of_its_own():
    class Own(keras.Sequential):
        def train_step(self, *args):
            return super().train_step(*args)

    with pytest.raises(ValueError, match="Own has a train_step of its own"):
        bb.accumulate(Own(), every=2)


@pytest.mark.parametrize("door", [{"micro_batch": 2}, {"every": 2}])
class TestAtFit:
    def refused(self, door, match, x, y, kind=ValueError, **options):
        model = bb.accumulate(mlp(**options), **door)
        before = [array(v) for v in model.variables]
        for train in (
            lambda: model.fit(x, y, batch_size=4, verbose=0),
            lambda: model.train_on_batch(x, y),
        ):
            with pytest.raises(kind, match=match):
                train()
        assert all(np.array_equal(array(v), b) for v, b in zip(model.variables, before, strict=True))

    def test_lengths(self, door):
        x, y = data(8)
        self.refused(door, r"Received: batch\['x'\] of length 8, batch\['y'\] of length 7", x, y[:7])

    def test_the_batch_is_not_leading(self, door):
        x, y = data(8)
        self.refused(door, r"Received: batch\['x'\] of length 4, batch\['y'\] of length 8", x.T, y)

    def test_a_scalar(self, door):
        x, _ = data(8)
        self.refused(door, r"must be an array with a leading dimension", x, np.float64(1), kind=TypeError)

    def test_a_loss_that_is_not_reduced(self, door):
        loss = keras.losses.MeanSquaredError(reduction=None)
        self.refused(door, "The loss must be a scalar of a floating type", *data(8), loss=loss)

    def test_a_loss_that_lost_the_batch(self, door):

        def loss(y, y_pred):
            return keras.ops.mean(keras.ops.square(y - y_pred), axis=0)

        self.refused(door, "A loss must return one value an example", *data(8), loss=loss)

    def test_a_loss_that_leaves_examples_out(self, door):
        """How many values are left, only the data can tell."""

        def loss(y, y_pred):
            values = keras.ops.mean(keras.ops.square(y - y_pred), axis=-1)
            if keras.backend.backend() == "jax":
                return values[:-1]
            return values[keras.ops.convert_to_tensor(y)[:, 0] > 0]

        x, y = data(8)
        y[::2, 0], y[1::2, 0] = 1, -1
        kinds = [ValueError]
        if keras.backend.backend() == "tensorflow":
            kinds.append(import_module("tensorflow").errors.InvalidArgumentError)
        self.refused(door, "A loss must return one value an example", x, y, kind=tuple(kinds), loss=loss)

    def test_gradient_accumulation_steps(self, door):
        x, y = data(8)
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
            bb.accumulate(mlp(optimizer=optimizer), **door)
        model = bb.accumulate(mlp(), **door)
        model.compile(optimizer, "mse")
        with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
            model.fit(x, y, verbose=0)

    def test_not_compiled(self, door):
        model = bb.accumulate(keras.Sequential([keras.layers.Dense(1)]), **door)
        with pytest.raises(ValueError, match="You must call `compile\\(\\)` before"):
            model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)

    def test_batch_norm_is_named_once(self, door):
        frozen = keras.layers.BatchNormalization(name="still", trainable=False)
        layers = [keras.Input((4,)), keras.layers.BatchNormalization(name="norm"), frozen, keras.layers.Dense(3)]
        model = keras.Sequential(layers)
        model.compile("sgd", "mse")
        bb.accumulate(model, **door)
        with pytest.warns(UserWarning, match="not over the batch: norm. The update"):
            model.fit(*data(8), verbose=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.train_on_batch(*data(8))
