"""What others do to a window: inside it is refused by name, between two windows it is allowed."""

import keras
import numpy as np
import pytest

import bigbatch.keras as bb
from conformance.keras_driver import array
from conformance.keras_parity import BACKEND, close, data, float64, mlp

METHODS = (({"micro_batch": 4}, 8), ({"every": 2}, 4))


@pytest.fixture(autouse=True)
def _float64():
    float64()


class Doing(keras.layers.Layer):
    """Code of a user's own in the model."""

    act = None

    def call(self, x):
        if self.act is not None:
            self.act()
        return x


def made(**options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), Doing(), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.5), "mse", **options)
    return model


def values(model):
    return [array(v) for v in [*model.trainable_variables, *model.optimizer.variables]]


def acts(model, path):
    model.save_weights(path)
    one = keras.ops.ones((4, 3), "float64")
    return {
        "optimizer.apply": lambda: model.optimizer.apply([one, one[0]], model.trainable_variables),
        "assign": lambda: model.trainable_variables[0].assign(one),
        "load_weights": lambda: model.load_weights(path),
        "train_on_batch": lambda: model.train_on_batch(*data(4)),
        "evaluate": lambda: model.evaluate(*data(4), verbose=0),
        "compile": lambda: model.compile("sgd", "mse"),
        "trainable": lambda: setattr(model.layers[1], "trainable", False),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("act", [
    "optimizer.apply", "assign", "load_weights", "train_on_batch", "evaluate", "compile", "trainable",
])  # fmt: skip
def test_inside_a_compiled_window_it_is_refused_by_name(tmp_path, act, method):
    options, size = method
    x, y = data(8)
    model = bb.accumulate(made(), **options)
    model._symbolic_build(data_batch=(x, y))  # which calls the model as well
    before, layer = values(model), model.layers[0]
    layer.act = acts(model, tmp_path / "m.weights.h5")[act]
    with pytest.raises((RuntimeError, ValueError), match=act):
        model.fit(x, y, batch_size=size, shuffle=False, verbose=0)
    layer.act = None
    model.layers[1].trainable = True
    assert all(np.array_equal(a, b) for a, b in zip(values(model), before, strict=True))
    plain = made()
    plain.train_on_batch(x, y)
    model.fit(x, y, batch_size=size, shuffle=False, verbose=0)
    close(model, plain)


def test_a_layer_that_writes_to_its_own_weights_is_refused_in_several_micro_batches_and_taken_in_one():
    def spectral():
        keras.utils.set_random_seed(0)
        dense = keras.layers.SpectralNormalization(keras.layers.Dense(3))
        model = keras.Sequential([keras.Input((4,)), dense])
        model.compile("sgd", "mse")
        return model

    x, y = data(8)
    ours, plain = bb.accumulate(spectral(), micro_batch=8), spectral()
    for model in (ours, plain):
        model.train_on_batch(x, y)
    close(ours, plain)
    with pytest.raises(RuntimeError, match=r"kernel\.assign was called inside an open window"):
        bb.accumulate(spectral(), micro_batch=4).train_on_batch(x, y)


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_and_data_between_two_windows_may_do_all_of_it(method):
    """And an exception there leaves the next window exact."""
    options, size = method
    x, y = data(16)

    class Callback(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                first = self.model.trainable_variables[0]
                first.assign(array(first) * 0.5)
                self.model.evaluate(x[:8], y[:8], verbose=0, batch_size=8)
            if epoch == 2:
                raise InterruptedError

        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = self.stops

        stops = False

    def run(model, size):
        callback = Callback()
        with pytest.raises(InterruptedError):
            model.fit(x, y, batch_size=size, epochs=3, shuffle=False, verbose=0, callbacks=[callback])
        callback.stops = True  # after one step
        model.fit(x, y, batch_size=size, shuffle=False, verbose=0, callbacks=[callback])
        model.fit(x, y, batch_size=size, shuffle=False, verbose=0)
        return model

    ours, plain = run(bb.accumulate(mlp(), **options), size), run(mlp(), 8)
    close(ours, plain)


@pytest.mark.parametrize("method", METHODS)
def test_compiling_again_between_two_windows_trains_what_was_compiled(method):
    """`jax.jit` remembers what it traced of a function, and its caller does not see."""
    options, size = method
    x, y = data(8)

    def run(model, size):
        for loss, rate in (("mse", 0.1), ("mae", 0.1), ("mae", 0.3)):
            model.compile(keras.optimizers.SGD(rate), loss)
            model.fit(x, y, batch_size=size, shuffle=False, verbose=0)
        return model

    close(run(bb.accumulate(made(), **options), size), run(made(), 8))


if BACKEND == "torch":

    def test_gradients_of_others_that_lie_there_before_a_window_are_discarded():
        x, y = data(8)
        ours, plain = bb.accumulate(made(), micro_batch=4), made()
        for v in ours.trainable_variables:
            v.value.grad = keras.ops.ones_like(v.value).detach()
        for model in (ours, plain):
            model.train_on_batch(x, y)
        close(ours, plain)
