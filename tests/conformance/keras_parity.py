"""Plain `fit` on the whole batch, beside ours, in float64."""

import keras
import numpy as np

import bigbatch.keras as bb
from conformance.keras_driver import BACKEND as BACKEND
from conformance.keras_driver import array


def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)


def mlp(loss="mse", units=3, **options):
    """A compiled model; the same weights each time."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(units)])
    model.compile(**{"optimizer": keras.optimizers.SGD(0.5, momentum=0.9), "loss": loss, **options})
    return model


def data(n=22, units=3, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 4)), rng.normal(size=(n, units))


def close(ours, plain, relative=1e-12):
    """The same weights, and the same that the optimizer holds."""
    pairs = [*zip(ours.variables, plain.variables, strict=True)]
    pairs += zip(ours.optimizer.variables, plain.optimizer.variables, strict=True)
    for a, b in pairs:
        if "seed" not in a.path:
            np.testing.assert_allclose(array(a), array(b), rtol=relative, atol=relative, err_msg=a.path)


def same_logs(ours, plain, relative=1e-12):
    assert ours.keys() == plain.keys()
    for name in plain:
        np.testing.assert_allclose(ours[name], plain[name], rtol=relative, err_msg=name)


def parity(make, *arrays, size=10, micro_batch=4, epochs=2, relative=1e-12, **options):
    """Fits `make()` plainly, through the split door and through the stream door, and compares all three.

    The batches are ragged twice over: the last batch of an epoch, and each batch's last micro-batch. The stream's
    micro-batches are a fifth of the batch.
    """
    options = {"epochs": epochs, "verbose": 0, "shuffle": False, **options}
    plain = make()
    logs = plain.fit(*arrays, batch_size=size, **options).history
    split = bb.accumulate(make(), micro_batch=micro_batch)
    same_logs(split.fit(*arrays, batch_size=size, **options).history, logs, relative)
    close(split, plain, relative)
    stream = bb.accumulate(make(), every=5)
    same_logs(stream.fit(*arrays, batch_size=size // 5, **options).history, logs, relative)
    close(stream, plain, relative)
    return plain, split, stream
