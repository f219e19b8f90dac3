"""What only the stream has: windows that an epoch's end cuts short, and `every`."""

import logging

import keras
import numpy as np
import pytest

import bigbatch.keras as bb
from conformance.keras_parity import BACKEND, close, data, float64, mlp


@pytest.fixture(autouse=True)
def _float64():
    float64()


def updates(model, x, y, *windows):
    """Plain updates on these rows."""
    for start, stop in windows:
        model.train_on_batch(x[start:stop], y[start:stop])
    return model


@pytest.mark.parametrize("partial", ["apply", "carry", "drop"])
def test_an_epochs_last_window(partial, caplog):
    """11 micro-batches of 2 in windows of 4: 3 are left, and of the second epoch's 3 + 11 with "carry" 2."""
    x, y = data(22)
    model = bb.accumulate(mlp(), every=4, partial=partial)
    with caplog.at_level(logging.INFO, "bigbatch.keras"):
        model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    plain = updates(mlp(), x, y, (0, 8), (8, 16))
    if partial == "carry":
        plain.train_on_batch(np.concatenate([x[16:], x[:2]]), np.concatenate([y[16:], y[:2]]))
        updates(plain, x, y, (2, 10), (10, 18))
    else:
        updates(plain, x, y, *[(16, 22)][: partial == "apply"], (0, 8), (8, 16), *[(16, 22)][: partial == "apply"])
    close(model, plain)
    said = {"apply": "applied", "carry": "carried to the next epoch", "drop": "dropped"}[partial]
    left = (3, 2) if partial == "carry" else (3, 3)
    assert [record.getMessage() for record in caplog.records] == [
        f"The epoch ended in a window: {n} micro-batches (every=4) {said}." for n in left
    ]


def test_steps_per_epoch_counts_micro_batches_and_goes_on_in_the_data():
    x, y = data(24)
    model = bb.accumulate(mlp(), every=4)
    model.fit(
        ((x[i : i + 2], y[i : i + 2]) for i in range(0, 24, 2)), steps_per_epoch=6, epochs=2, shuffle=False, verbose=0
    )
    close(model, updates(mlp(), x, y, (0, 8), (8, 12), (12, 20), (20, 24)))


def test_every_of_the_updates_index_and_resumed():
    x, y = data(24)
    plain = updates(mlp(), x, y, (0, 2), (2, 6), (6, 12), (12, 20), (20, 24))
    model = bb.accumulate(mlp(), every=lambda k: k + 1)
    model.fit(x, y, batch_size=2, shuffle=False, verbose=0)
    close(model, plain)
    again = bb.accumulate(mlp(), every=lambda k: k + 1)
    again.fit(x[:6], y[:6], batch_size=2, shuffle=False, verbose=0)
    again.fit(x[6:], y[6:], batch_size=2, shuffle=False, verbose=0)
    close(again, plain)


def test_every_so_many_examples():
    x, y = data(24)
    model = bb.accumulate(mlp(), every=bb.items(7))
    model.fit(x, y, batch_size=3, epochs=2, shuffle=False, verbose=0)
    close(model, updates(mlp(), x, y, *[(0, 9), (9, 18), (18, 24)] * 2))


def test_train_on_batch_is_a_window_of_its_own():
    x, y = data(8)
    model = bb.accumulate(mlp(), every=4, partial="drop")
    model.train_on_batch(x, y)
    close(model, updates(mlp(), x, y, (0, 8)))


if BACKEND != "torch":  # where nothing is compiled

    @pytest.mark.parametrize("options", [{}, {"jit_compile": True}][: 1 if BACKEND == "jax" else 2])
    def test_a_short_micro_batch_compiles_once_wherever_it_comes(options):
        """As `fit` shuffles a PyDataset's micro-batches."""
        traced = []

        def loss(y, y_pred):
            traced.append(y)
            return keras.ops.square(y - y_pred)

        x, y = data(10)
        model = bb.accumulate(mlp(loss, **options), every=4)
        for place in range(4):
            rows = [slice(i, min(i + 3, 10)) for i in range(0, 10, 3)]
            rows.insert(place, rows.pop())
            model.fit(((x[r], y[r]) for r in rows), steps_per_epoch=4, shuffle=False, verbose=0)
            if place == 0:
                first = len(traced)
        assert len(traced) == first
        close(model, updates(mlp(), x, y, *[(0, 10)] * 4))


def test_micro_batches_of_different_lengths_and_widths():
    """Sequences are padded within a micro-batch only."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    micro_batches = [(rng.normal(size=(n, t, 3)), rng.normal(size=(n, 1))) for n, t in ((3, 4), (1, 6), (2, 6), (4, 5))]

    def make():
        keras.utils.set_random_seed(0)
        pool = [keras.Input((None, 3)), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(1)]
        model = keras.Sequential(pool)
        model.compile(keras.optimizers.SGD(0.5), "mse")
        return model

    model = bb.accumulate(make(), every=4)
    model.fit((m for m in micro_batches), steps_per_epoch=4, shuffle=False, verbose=0)
    plain = make()
    gradients = []
    for x, y in micro_batches:
        one = make()
        one.train_on_batch(x, y)
        gradients.append(
            [np.array(b) - np.array(a) for a, b in zip(one.get_weights(), plain.get_weights(), strict=True)]
        )
    sizes = np.array([3, 1, 2, 4]) / 10
    for now, before, *steps in zip(model.get_weights(), plain.get_weights(), *gradients, strict=True):
        np.testing.assert_allclose(now, before - sum(n * s for n, s in zip(sizes, steps, strict=True)), rtol=1e-12)


def test_the_backup_callback_resumes(tmp_path):
    """11 micro-batches of 2 in windows of 1, 2, 3, 4, 1, …: the second epoch leaves one over, in a window of two."""

    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    x, y = data(22)
    fit = {"x": x, "y": y, "batch_size": 2, "epochs": 3, "shuffle": False, "verbose": 0}

    def model():
        return bb.accumulate(mlp(), every=lambda update: 1 + update % 4, partial="carry")

    straight, stopped, resumed = model(), model(), model()
    straight.fit(**fit)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(**fit, callbacks=[keras.callbacks.BackupAndRestore(tmp_path), Stop()])
    resumed.fit(**fit, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])
    close(resumed, straight, 0)
