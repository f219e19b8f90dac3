"""Copies of an accumulated model: they accumulate too, or a warning says that they do not."""

import copy
import pickle
import warnings

import keras
import numpy as np
import pytest

import bigbatch.keras as bb
from conformance.keras_driver import array
from conformance.keras_parity import close, data, float64, mlp

APIS = [({"micro_batch": 4}, 10), ({"every": 5}, 2)]
COPIES = {
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.fixture(autouse=True)
def _float64():
    float64()


def every_five(update):
    return 5


def fit(model, size):
    model.fit(*data(), batch_size=size, epochs=2, shuffle=False, verbose=0)
    return model


def ours(caught):
    """Of warnings, those that are bigbatch's."""
    return [str(one.message) for one in caught if "accumulate" in str(one.message)]


@pytest.mark.parametrize(("api", "size"), APIS)
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_accumulates_from_where_the_model_was(way, api, size):
    plain, model = mlp(), bb.accumulate(mlp(), **api)
    fit(plain, 10)
    fit(model, size)
    again = COPIES[way](model)
    assert again is not model
    fit(plain, 10)
    fit(again, size)
    close(again, plain)
    fit(model, size)
    close(model, again)


@pytest.mark.parametrize("way", COPIES)
def test_the_options_go_along(way):
    made = fit(bb.accumulate(mlp(), every=every_five, partial="drop", noise=1), 2)
    again = fit(COPIES[way](made), 2)
    assert int(array(again.optimizer.iterations)) == 8  # of 22 in 2s, an epoch has two windows of 5 and a rest
    assert bb.noise_scale(again).windows == 4


def test_a_function_that_no_pickle_can_hold_is_pythons_own_error():
    model = fit(bb.accumulate(mlp(), every=lambda update: 2), 5)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(model)
    fit(copy.deepcopy(model), 5)


def test_off_again_a_copy_is_plain():
    model = bb.accumulate(fit(bb.accumulate(mlp(), every=5), 2), None)
    assert "fit" not in vars(pickle.loads(pickle.dumps(model)))


def functional():
    x = keras.Input((4,))
    model = keras.Model(x, keras.layers.Dense(3)(x))
    model.compile("sgd", "mse")
    return model


@keras.saving.register_keras_serializable()
class Subclassed(keras.Model):
    def __init__(self, **options):
        super().__init__(**options)
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def subclassed():
    model = Subclassed(name="mine")
    model.compile("sgd", "mse")
    model(np.ones((1, 4)))
    return model


@pytest.mark.parametrize("make", [mlp, functional, subclassed])
def test_a_clone_says_that_it_does_not(make):
    model = fit(bb.accumulate(make(), every=4), 2)
    texts = []
    for accumulated in (model, bb.accumulate(make(), None)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clone = keras.models.clone_model(accumulated)
        assert "fit" not in vars(clone)
        texts.append(ours(caught))
    says = f"The clone of {model.name} does not accumulate. Call bigbatch.keras.accumulate on it as well."
    assert texts == [[says], []]


def test_saving_says_nothing(tmp_path):
    model = fit(bb.accumulate(mlp(), every=4), 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save(tmp_path / "model.keras")
        json = model.to_json() + str(model.get_compile_config())
    assert ours(caught) == []
    assert "bigbatch" not in json
    close(keras.models.load_model(tmp_path / "model.keras"), model)
