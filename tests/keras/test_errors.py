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
from conformance.laws import MESSAGES, STREAM_MESSAGES


@pytest.fixture(autouse=True)
def _float64():
    float64()


@pytest.mark.parametrize("mistake", sorted(STREAM_MESSAGES))
def test_the_streams_words(mistake):
    kind, text = MESSAGES[mistake]
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

    text = rf"Own has a train_step of its own.*compute_loss.*two optimizers.*bigbatch\.{keras.backend.backend()}\."
    with pytest.raises(ValueError, match=text):
        bb.accumulate(Own(), every=2)


@pytest.mark.parametrize("every", [{}, {"micro_batch": 2}, {"micro_batch": "auto"}, {"micro_batch": None}])
@pytest.mark.parametrize("partial", ["apply", "carry", "drop"])
def test_partial_has_no_effect_without_every(partial, every):
    model = bb.accumulate(mlp(), every=3)
    before = dict(vars(model))
    match = "partial has no effect without every. Received: partial=" if every else "Pass one of micro_batch and every"
    with pytest.raises(ValueError, match=match):
        bb.accumulate(model, partial=partial, **every)
    assert vars(model) == before


def test_noise_has_no_effect_where_nothing_accumulates():
    model = bb.accumulate(mlp(), every=3)
    before = dict(vars(model))
    with pytest.raises(ValueError, match=r"noise has no effect .* Received: noise=True \(bool\)"):
        bb.accumulate(model, None, noise=True)
    assert vars(model) == before


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("micro_batch", "Auto", TypeError),
        ("micro_batch", "32", TypeError),
        ("micro_batch", np.array([1, 2]), TypeError),
        ("micro_batch", True, TypeError),
        ("micro_batch", -1, ValueError),
        ("every", "8", TypeError),
        ("every", np.array([1, 2]), TypeError),
        ("every", [2], TypeError),
        ("noise", "yes", ValueError),
        ("noise", -1, ValueError),
    ],
)
def test_a_bad_option_leaves_the_model_as_it_was(name, value, kind):
    model = bb.accumulate(mlp(), every=3)
    before = dict(vars(model))
    options = {"every": 2, name: value} if name == "noise" else {name: value}
    with pytest.raises(kind, match=rf"{name} must be .*Received: {name}="):
        bb.accumulate(model, **options)
    assert vars(model) == before


def stateful(steps=3):
    parts = [keras.Input(batch_shape=(4, steps, 5)), keras.layers.LSTM(4, stateful=True, name="memory")]
    model = keras.Sequential([*parts, keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("micro_batch", [2, "auto"])
def test_a_stateful_layer_is_not_cut(micro_batch):
    model = stateful()
    with pytest.raises(ValueError, match=r"Received: memory, with stateful=True.*every=n"):
        bb.accumulate(model, micro_batch=micro_batch)
    assert "fit" not in vars(model)
    with pytest.raises(ValueError, match="stateful=True"):
        bb.audit(model, np.ones((4, 3, 5)), np.ones((4, 2)), micro_batch=2)


def test_a_stateful_layer_that_comes_later_is_not_cut():
    model = bb.accumulate(keras.Sequential([keras.Input(batch_shape=(4, 3, 5))]), micro_batch=2)
    model.add(keras.layers.LSTM(2, stateful=True, name="memory"))
    model.compile("sgd", "mse")
    before = model.get_weights()
    with pytest.raises(ValueError, match="Received: memory, with stateful=True"):
        model.fit(np.ones((4, 3, 5)), np.ones((4, 2)), batch_size=4, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


if keras.backend.backend() != "torch":  # where plain Keras cannot train one

    @pytest.mark.parametrize("steps", [(3, 3, 3), (2, 5, 3)])
    def test_a_stateful_layer_in_a_stream_goes_from_micro_batch_to_micro_batch(steps):
        """With a rate of nothing the state alone moves, as in plain fit on the same batches: on TensorFlow only."""
        rng = np.random.default_rng(1)
        sequences = [(rng.normal(size=(4, n, 5)), np.ones((4, 2))) for n in steps]
        states = []
        for make in (lambda model: model, lambda model: bb.accumulate(model, every=3)):
            keras.utils.set_random_seed(0)
            model = make(stateful(steps=None))
            model.compile(keras.optimizers.SGD(0.0), "mse")
            model.fit((pair for pair in sequences), steps_per_epoch=3, verbose=0, shuffle=False)
            states.append([array(v) for v in model.layers[0].states])
        assert np.any(states[0][0]) == (keras.backend.backend() == "tensorflow")
        for plain, ours in zip(*states, strict=True):
            np.testing.assert_allclose(ours, plain, rtol=1e-12)


def sparse(array):
    if keras.backend.backend() == "tensorflow":
        return import_module("tensorflow").sparse.from_dense(array)
    return import_module("jax.experimental.sparse").BCOO.fromdense(array)


if keras.backend.backend() != "torch":  # where Keras makes dense tensors of them

    @pytest.mark.parametrize("api", [{"micro_batch": 2}, {"every": 2}])
    def test_a_sparse_batch(api):
        model = bb.accumulate(mlp(), **api)
        with pytest.raises(TypeError, match=r"must be a dense array. Received: batch\['x'\].*Pass a dense array"):
            model.fit(sparse(data(8)[0]), data(8)[1], batch_size=4, verbose=0)


if keras.backend.backend() == "tensorflow":

    @pytest.mark.parametrize("api", [{"micro_batch": 2}, {"every": 2}, {"micro_batch": "auto"}])
    @pytest.mark.parametrize("in_a_data_set", [False, True])
    def test_a_ragged_batch(api, in_a_data_set):
        tf = import_module("tensorflow")
        rows, y = tf.ragged.constant([[1], [2, 3], [4], [1, 2, 3]]), np.ones((4, 3))
        mean = keras.layers.Lambda(lambda x: tf.reduce_mean(x, axis=1), output_shape=(3,))
        model = keras.Sequential([keras.Input((None,), dtype="int32", ragged=True), keras.layers.Embedding(5, 3), mean])
        model.compile("sgd", "mse")
        bb.accumulate(model, **api)
        given = (tf.data.Dataset.from_tensor_slices((rows, y)).batch(2),) if in_a_data_set else (rows, y)
        before = model.get_weights()
        match = r"dense array. Received: batch\['x'\], a RaggedTensor of shape .*to_tensor\(\) and mask"
        with pytest.raises(TypeError, match=match):
            model.fit(*given, verbose=0, shuffle=False)
        assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


if keras.backend.backend() == "jax":

    def test_compute_loss_and_updates_of_its_own():
        class Own(keras.Sequential):
            def compute_loss_and_updates(self, *args, **kwargs):
                return super().compute_loss_and_updates(*args, **kwargs)

        with pytest.raises(ValueError, match="Own has a compute_loss_and_updates of its own"):
            bb.accumulate(Own(), every=2)


@pytest.mark.parametrize("api", [{"micro_batch": 2}, {"every": 2}])
class TestAtFit:
    def refused(self, api, match, x, y, kind=ValueError, **options):
        model = bb.accumulate(mlp(**options), **api)
        before = [array(v) for v in model.variables]
        for train in (
            lambda: model.fit(x, y, batch_size=4, verbose=0),
            lambda: model.train_on_batch(x, y),
        ):
            with pytest.raises(kind, match=match):
                train()
        assert all(np.array_equal(array(v), b) for v, b in zip(model.variables, before, strict=True))

    def test_lengths(self, api):
        x, y = data(8)
        self.refused(api, r"Received: batch\['x'\] of length 8, batch\['y'\] of length 7", x, y[:7])

    def test_the_batch_is_not_leading(self, api):
        x, y = data(8)
        self.refused(api, r"Received: batch\['x'\] of length 4, batch\['y'\] of length 8", x.T, y)

    def test_a_scalar(self, api):
        x, _ = data(8)
        self.refused(api, r"must be an array with a leading dimension", x, np.float64(1), kind=TypeError)

    def test_a_loss_that_is_not_reduced(self, api):
        loss = keras.losses.MeanSquaredError(reduction=None)
        self.refused(api, "The loss must be a scalar of a floating type", *data(8), loss=loss)

    def test_a_loss_that_lost_the_batch(self, api):

        def loss(y, y_pred):
            return keras.ops.mean(keras.ops.square(y - y_pred), axis=0)

        self.refused(api, "A loss must return one value an example", *data(8), loss=loss)

    def test_a_loss_that_leaves_examples_out(self, api):
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
        self.refused(api, "A loss must return one value an example", x, y, kind=tuple(kinds), loss=loss)

    def test_gradient_accumulation_steps(self, api):
        x, y = data(8)
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
            bb.accumulate(mlp(optimizer=optimizer), **api)
        model = bb.accumulate(mlp(), **api)
        model.compile(optimizer, "mse")
        with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
            model.fit(x, y, verbose=0)

    def test_not_compiled(self, api):
        model = bb.accumulate(keras.Sequential([keras.layers.Dense(1)]), **api)
        with pytest.raises(ValueError, match="You must call `compile\\(\\)` before"):
            model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)

    def test_batch_norm_is_named_once(self, api):
        frozen = keras.layers.BatchNormalization(name="still", trainable=False)
        layers = [keras.Input((4,)), keras.layers.BatchNormalization(name="norm"), frozen, keras.layers.Dense(3)]
        model = keras.Sequential(layers)
        model.compile("sgd", "mse")
        bb.accumulate(model, **api)
        with pytest.warns(UserWarning, match="not over the batch: norm. The update"):
            model.fit(*data(8), verbose=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.train_on_batch(*data(8))
