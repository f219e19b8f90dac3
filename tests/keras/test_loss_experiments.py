"""Losses that are not the mean of their examples' own values: one warning that names them, and none for the others."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import bigbatch.keras as bb
from conformance.keras_driver import array
from conformance.keras_parity import BACKEND, float64

RNG = np.random.default_rng(3)
X, Y = RNG.normal(size=(12, 4)), RNG.normal(size=(12, 3))
ONES = (RNG.random((12, 3)) < 0.5).astype("float64")
LABELS = RNG.integers(0, 3, 12)
IMAGES = RNG.normal(size=(12, 4, 4, 2))
MASKS = (RNG.random((12, 4, 4, 1)) < np.linspace(0.1, 0.9, 12)[:, None, None, None]).astype("float64")
APIS = [({"micro_batch": 4}, 12), ({"every": 3}, 4)]
OF_A_BATCH, MIXING, ADDED = "returns one number a batch", "compares the examples", "add_loss or compute_loss"


@pytest.fixture(autouse=True)
def _float64():
    float64()


def heard(model, x, y, api=APIS[0]):
    """What the losses' warnings are, of two calls of fit."""
    how, size = api
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bb.accumulate(model, **how)
        for _ in range(2):
            model.fit(x, y, batch_size=size, shuffle=False, verbose=0)
    texts = [str(one.message) for one in caught]
    return [text for text in texts if any(kind in text for kind in (OF_A_BATCH, MIXING, ADDED))]


def compiled(loss, *parts, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), *parts])
    model.compile("sgd", loss, **options)
    return model


def segmenter(loss):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(1, 1, activation="sigmoid")])
    model.compile("sgd", loss)
    return model


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("kind", [keras.losses.Dice, keras.losses.Tversky])
class TestOverlap:
    def test_over_the_batch_it_warns_once_with_the_remedy(self, kind, api):
        (text,) = heard(segmenter(kind()), IMAGES, MASKS, api)
        assert f"{OF_A_BATCH}, which bigbatch does not find to be the mean over its examples: {kind().name}." in text
        assert "pass axis=" in text

    def test_an_examples_own_is_quiet(self, kind, api):
        assert heard(segmenter(kind(axis=(1, 2, 3))), IMAGES, MASKS, api) == []


def test_compiled_again_it_warns_again_and_accumulated_again_it_does_not():
    model = segmenter("dice")
    assert len(heard(model, IMAGES, MASKS)) == 1
    assert heard(model, IMAGES, MASKS, APIS[1]) == []
    model.compile("sgd", "dice")
    assert len(heard(model, IMAGES, MASKS)) == 1


def test_circle_compares_examples():
    (text,) = heard(compiled(keras.losses.Circle(), layers.Dense(3)), X, LABELS)
    assert f"{MIXING} of a batch with one another: circle." in text


# Of the framework's own: each with targets that suit it.
QUIET = {
    "ones": (
        "BinaryCrossentropy BinaryFocalCrossentropy CategoricalCrossentropy CategoricalFocalCrossentropy "
        "CategoricalHinge CosineSimilarity Hinge Huber KLDivergence LogCosh MeanAbsoluteError "
        "MeanAbsolutePercentageError MeanSquaredError MeanSquaredLogarithmicError Poisson SquaredHinge"
    ),
    "labels": "SparseCategoricalCrossentropy CategoricalGeneralizedCrossEntropy",
}


@pytest.mark.parametrize("reduction", ["sum", "mean_with_sample_weight"])
@pytest.mark.parametrize(("targets", "name"), [(kind, name) for kind, names in QUIET.items() for name in names.split()])
def test_kerass_own_losses_of_an_example_are_quiet(targets, name, reduction):
    loss = getattr(keras.losses, name)(reduction=reduction)
    model = compiled(loss, layers.Dense(3, activation="softmax"), run_eagerly=BACKEND != "jax")
    assert heard(model, X, ONES if targets == "ones" else LABELS) == []


def mean(y, y_pred):
    return ops.mean(ops.square(y - y_pred))


def a_value_an_example(y, y_pred):
    return ops.max(ops.abs(y - y_pred), axis=-1)


def summed(y, y_pred):
    return ops.sum(ops.square(y - y_pred))


def over_what_counts(y, y_pred):
    counts = ops.cast(y > 0, y_pred.dtype)
    return ops.sum(counts * ops.square(y - y_pred)) / ops.sum(counts)


def with_its_neighbour(y, y_pred):
    return ops.mean(ops.square(y_pred - ops.roll(y_pred, 1, axis=0)), axis=-1)


def by_the_largest(y, y_pred):
    return ops.mean(ops.square(y - y_pred), axis=-1) / ops.max(ops.abs(y_pred))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("loss", [mean, a_value_an_example])
def test_a_mean_of_ones_own_is_quiet(loss, api):
    assert heard(compiled(loss, layers.Dense(3)), X, Y, api) == []


@pytest.mark.parametrize(
    ("loss", "kind"),
    [(summed, OF_A_BATCH), (over_what_counts, OF_A_BATCH), (with_its_neighbour, MIXING), (by_the_largest, MIXING)],
)
def test_a_loss_of_ones_own_is_named(loss, kind):
    (text,) = heard(compiled(loss, layers.Dense(3)), X, Y)
    assert kind in text
    assert f": {loss.__name__}." in text


def test_a_loss_that_cannot_be_tried_counts_as_one_that_is_no_mean():
    def picky(y, y_pred):
        if y.shape[0] == 2:  # as only an experiment asks
            raise RuntimeError("no twos")
        return ops.mean(ops.square(y - y_pred))

    (text,) = heard(compiled(picky, layers.Dense(3)), X, Y)
    assert "picky" in text


def test_each_of_several_losses_is_tried():
    x = keras.Input((4,))
    outputs = {name: layers.Dense(3, name=name)(x) for name in ("good", "bad")}
    model = keras.Model(x, outputs)
    model.compile("sgd", {"good": "mse", "bad": summed})
    (text,) = heard(model, X, {"good": Y, "bad": Y})
    assert ": summed." in text
    assert "mean_squared_error" not in text


class Adds(layers.Layer):
    def __init__(self, of, **options):
        super().__init__(**options)
        self.of = of

    def call(self, x):
        self.add_loss(0.01 * self.of(ops.square(x)))
        return x


class Sampling(layers.Layer):
    """A variational autoencoder's, which is random in inference too."""

    def __init__(self, of, **options):
        super().__init__(**options)
        self.of, self.seed = of, keras.random.SeedGenerator(1)

    def call(self, x):
        self.add_loss(self.of(0.5 * ops.sum(ops.exp(x) + ops.square(x) - 1 - x, axis=-1)))
        return x + ops.exp(0.5 * x) * keras.random.normal(ops.shape(x), seed=self.seed)


class Itself(keras.Model):
    def __init__(self, of, **options):
        super().__init__(**options)
        self.of, self.drop, self.dense = of, layers.Dropout(0.5), layers.Dense(3)

    def call(self, x, training=False):
        x = self.drop(x, training=training)
        if training:
            self.add_loss(0.1 * self.of(ops.square(x)))
        return self.dense(x)


def adding(kind, of):
    keras.utils.set_random_seed(0)
    if kind is Itself:
        model = Itself(of, name="itself")
    else:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(4), kind(of, name="adds"), layers.Dense(3)])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("kind", [Adds, Sampling])
class TestAddLoss:
    @pytest.mark.parametrize("api", APIS)
    def test_a_sum_is_named(self, kind, api):
        (text,) = heard(adding(kind, ops.sum), X, Y, api)
        assert ADDED in text
        assert ": adds (add_loss)." in text
        assert "keras.ops.mean" in text

    def test_a_mean_is_quiet(self, kind):
        assert heard(adding(kind, ops.mean), X, Y) == []


def test_a_model_that_adds_a_sum_itself_in_training():
    (text,) = heard(adding(Itself, ops.sum), X, Y)
    assert ": itself (add_loss)." in text


def test_regularizers_are_quiet():
    parts = [
        layers.Dense(4, kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.1)),
        layers.ActivityRegularization(0.1),
        layers.Dense(3),
    ]
    assert heard(compiled("mse", *parts), X, Y) == []


@pytest.mark.parametrize(("of", "count"), [(ops.mean, 0), (ops.sum, 1)])
def test_a_compute_loss_of_ones_own(of, count):
    class Own(keras.Sequential):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return of(ops.square(y - y_pred))

    keras.utils.set_random_seed(0)
    model = Own([keras.Input((4,)), layers.Dense(3)])
    model.compile("sgd")
    texts = heard(model, X, Y)
    assert len(texts) == count
    assert all(": Own.compute_loss." in text for text in texts)


def test_the_experiments_change_nothing():
    """Weights, statistics, seeds and the next random number are those of a run without them."""

    def trained(examine, monkeypatch):
        if not examine:
            monkeypatch.setattr("bigbatch.keras.loss_experiments.warn_of_compiled_losses", lambda *args: None)
            monkeypatch.setattr("bigbatch.keras.loss_experiments.warn_of_added_losses", lambda *args: None)
        keras.utils.set_random_seed(5)
        parts = [layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.3), Sampling(ops.sum), layers.Dense(3)]
        model = keras.Sequential([keras.Input((4,)), *parts])
        model.compile(keras.optimizers.SGD(0.1), summed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bb.accumulate(model, every=3).fit(X, Y, batch_size=4, epochs=2, verbose=0)
        drawn = [np.random.default_rng(0).random(), np.random.random(), array(keras.random.normal((2,)))]
        return [array(v) for v in model.variables], drawn

    with pytest.MonkeyPatch.context() as monkeypatch:
        without = trained(False, monkeypatch)
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_them = trained(True, monkeypatch)
    for one, other in zip(with_them, without, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_audit_does_not_warn():
    model = segmenter("dice")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*one number a batch")
        assert not bb.audit(model, IMAGES, MASKS, micro_batch=4).exact
    assert len(heard(model, IMAGES, MASKS)) == 1
