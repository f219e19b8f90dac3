"""Models whose class has a `fit` of its own, which makes the data, as those of keras-hub: raw data in, windows out."""

import keras
import numpy as np
import pytest
from keras import layers

import bigbatch.keras as bb
from conformance.keras_driver import array
from conformance.keras_parity import BACKEND, close, data, float64, same_logs

APIS = [({"micro_batch": 4}, 10), ({"every": 5}, 2)]


@pytest.fixture(autouse=True)
def _float64():
    float64()


class Doubled(keras.utils.PyDataset):
    """Batches of raw numbers, doubled on the way."""

    def __init__(self, x, y, sample_weight, size):
        super().__init__()
        self.arrays, self.size = (x, y) if sample_weight is None else (x, y, sample_weight), size

    def __len__(self):
        return -(-len(self.arrays[0]) // self.size)

    def __getitem__(self, i):
        x, *others = (a[i * self.size : (i + 1) * self.size] for a in self.arrays)
        return (np.asarray([[2 * float(number) for number in row] for row in x]), *others)


class Pipeline(keras.Model):
    """Takes texts of numbers, and hands a data set to Keras's own `fit`; the signature is keras-hub's."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = layers.Dense(5, activation="tanh"), layers.Dense(3)

    def call(self, x):
        return self.out(self.hidden(x))

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        sample_weight=None,
        validation_data=None,
        validation_split=None,
        **kwargs,
    ):
        x = Doubled(x, y, sample_weight, batch_size)
        if validation_data is not None:
            validation_data = Doubled(*validation_data, None, batch_size)
        kwargs = {"y": None, "batch_size": None, "sample_weight": None, **kwargs}
        return super().fit(x=x, validation_data=validation_data, **kwargs)

    def train_on_batch(self, x, y=None, sample_weight=None, **kwargs):
        x = Doubled(x, y, sample_weight, len(x))[0][0]
        return super().train_on_batch(x=x, y=y, sample_weight=sample_weight, **kwargs)


def made(kind=Pipeline):
    keras.utils.set_random_seed(0)
    model = kind()
    model.compile(keras.optimizers.SGD(0.5, momentum=0.9), "mse", metrics=["mae"])
    return model


def texts(n=22):
    x, y = data(n)
    return x.astype("U22"), y


@pytest.mark.parametrize(("api", "size"), APIS)
def test_an_overridden_fit_takes_raw_data(api, size):
    x, y = texts()
    weight = np.random.default_rng(2).uniform(0.1, 3, 22)
    counted = []

    class Counting(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            counted.append(batch)

    options = {"sample_weight": weight, "epochs": 2, "shuffle": False, "verbose": 0, "validation_data": texts(7)}
    plain = made()
    logs = plain.fit(x, y, batch_size=10, **options).history
    ours = bb.accumulate(made(), **api)
    same_logs(ours.fit(x, y, batch_size=size, callbacks=[Counting()], **options).history, logs)
    close(ours, plain)
    assert counted == [0, 1, 2] * 2


@pytest.mark.parametrize(("api", "size"), APIS)
def test_an_overridden_train_on_batch(api, size):
    plain, ours = made(), bb.accumulate(made(), **api)
    for model in (plain, ours):
        for _ in range(2):
            model.train_on_batch(*texts(10))
    close(ours, plain)


def test_steps_are_counted_in_micro_batches():
    x, y = texts(20)
    plain, ours = made(), bb.accumulate(made(), every=5)
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    plain.fit(x, y, batch_size=10, steps_per_epoch=1, **options)
    ours.fit(x, y, batch_size=2, steps_per_epoch=5, **options)
    assert int(array(ours.optimizer.iterations)) == 2
    close(ours, plain)


def test_evaluate_sees_the_data_set_as_it_is():
    x, y = data()
    model = bb.accumulate(made(), every=5)
    model.fit(*texts(), batch_size=2, verbose=0)
    whole = model.evaluate(x, y, batch_size=22, verbose=0)
    np.testing.assert_allclose(model.evaluate(x, y, batch_size=2, verbose=0), whole, rtol=1e-9)


def test_back_to_plain():
    plain, ours = made(), bb.accumulate(bb.accumulate(made(), every=5), None)
    for model in (plain, ours):
        model.fit(*texts(), batch_size=4, shuffle=False, verbose=0)
    close(ours, plain)


def test_a_fit_that_never_comes_to_keras_is_an_error():
    class Own(Pipeline):
        def fit(self, x, y, **kwargs):
            return None

    with pytest.raises(RuntimeError, match=r"Own.fit has not called keras.Model.fit.*super\(\).fit"):
        bb.accumulate(made(Own), every=5).fit(*texts())


def test_after_an_error_in_fit_evaluate_counts_its_own_batches():
    x, y = data()
    model = bb.accumulate(made(), every=5)
    model.fit(*texts(), batch_size=2, verbose=0)
    before = model.evaluate(x, y, batch_size=2, verbose=0)
    with pytest.raises(ValueError, match="could not convert string"):
        model.fit(np.array([["a"] * 4] * 22), y, batch_size=2, verbose=0)
    np.testing.assert_allclose(model.evaluate(x, y, batch_size=2, verbose=0), before, rtol=1e-12)


if BACKEND == "tensorflow":

    def test_a_data_set_of_text_mapped_on_the_way():
        import tensorflow as tf

        class Mapped(Pipeline):
            def fit(self, x=None, **kwargs):
                return keras.Model.fit(self, x.map(lambda x, y: (2 * tf.strings.to_number(x, tf.float64), y)), **kwargs)

        def raw(size):
            return tf.data.Dataset.from_tensor_slices(texts()).batch(size)

        plain, ours = made(Mapped), bb.accumulate(made(Mapped), every=5)
        for model, size in ((plain, 10), (ours, 2)):
            model.fit(raw(size), epochs=2, shuffle=False, verbose=0)
        close(ours, plain)
