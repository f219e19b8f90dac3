"""`fit` as people use it: what Keras takes and offers, each against plain `fit` on the whole batch."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import bigbatch.keras as bb
from conformance.keras_driver import array
from conformance.keras_parity import BACKEND, close, data, float64, mlp, parity, same_logs


@pytest.fixture(autouse=True)
def _float64():
    float64()


@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size", "mean", "mean_with_sample_weight"])
def test_every_reduction_with_sample_weights(reduction):
    x, y = data()
    weight = np.random.default_rng(2).uniform(0.1, 3, 22)
    parity(
        lambda: mlp(keras.losses.MeanSquaredError(reduction=reduction), weighted_metrics=["mae"]),
        x,
        y,
        sample_weight=weight,
        epochs=1,
    )


def test_class_weight_and_metrics():
    x, _ = data()
    y = np.random.default_rng(3).integers(0, 3, 22)
    parity(
        lambda: mlp(
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy(from_logits=True)],
            weighted_metrics=["accuracy"],
        ),
        x,
        y,
        class_weight={0: 1.0, 1: 5.0, 2: 0.3},
    )


def test_masks_count_valid_steps_and_ignored_labels_do_not_count():
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 9, (22, 6))
    for row, n in zip(tokens, rng.integers(1, 7, 22), strict=True):
        row[n:] = 0
    labels = rng.integers(0, 9, (22, 6))
    labels[rng.random((22, 6)) < 0.3] = -100

    def make():
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Embedding(9, 4, mask_zero=True),
                layers.Dense(5, activation="tanh"),
                layers.Dense(9),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100)
        model.compile(keras.optimizers.SGD(0.5), loss)
        return model

    parity(make, tokens, labels)


def test_several_outputs_with_losses_weights_masks_add_loss_and_regularizers():
    # Batches of one length: on TensorFlow plain Keras weighs each batch alike in an output's own loss.
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 7, (20, 5))
    tokens[:, 0] = 1
    targets = {"steps": rng.normal(size=(20, 5, 2)), "whole": rng.normal(size=(20, 1)), "sum": rng.normal(size=(20, 1))}

    def make():
        keras.utils.set_random_seed(0)
        x = keras.Input((5,))
        h = layers.Embedding(7, 4, mask_zero=True, embeddings_regularizer=keras.regularizers.L2(0.01))(x)
        h = layers.Dense(4, activation="tanh", activity_regularizer=keras.regularizers.L1(0.1))(h)
        steps = layers.Dense(2, name="steps", kernel_regularizer="l2")(h)
        last = layers.GlobalAveragePooling1D()(h)
        outputs = {
            "steps": steps,
            "whole": layers.Dense(1, name="whole")(last),
            "sum": layers.Dense(1, name="sum")(last),
        }
        model = keras.Model(x, outputs)
        model.compile(
            keras.optimizers.SGD(0.1),
            {"steps": "mse", "whole": keras.losses.Huber(), "sum": keras.losses.MeanSquaredError(reduction="sum")},
            loss_weights={"steps": 2.0, "whole": 0.5, "sum": 0.01},
            metrics={"whole": ["mae"]},
        )
        return model

    parity(make, tokens, targets)


def test_a_subclassed_model_with_its_own_compute_loss_and_metrics():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)
            self.seen = keras.metrics.Mean(name="seen")

        def call(self, x):
            self.add_loss(0.1 * ops.mean(ops.square(x)))
            return self.dense(x)

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(ops.square(y - y_pred)) + ops.sum(ops.stack(self.losses))

        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.seen.update_state(ops.mean(y_pred, axis=-1))
            return super().compute_metrics(x, y, y_pred, sample_weight)

    def make():
        keras.utils.set_random_seed(0)
        model = Own()
        model.compile(keras.optimizers.SGD(0.1))
        return model

    parity(make, *data())


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, size):
        super().__init__()
        self.x, self.y, self.size = x, y, size

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, i):
        place = slice(i * self.size, (i + 1) * self.size)
        return self.x[place], self.y[place]


def sources(x, y, size):
    """Each kind of data set that yields batches of `size`, in order."""
    import tensorflow as tf
    import torch

    tensors = torch.utils.data.TensorDataset(torch.as_tensor(x), torch.as_tensor(y))
    pairs = Batches(x, y, size)
    return {
        "tf.data": tf.data.Dataset.from_tensor_slices((x, y)).batch(size),
        "PyDataset": pairs,
        "DataLoader": torch.utils.data.DataLoader(tensors, batch_size=size),
        "generator": (pairs[i] for _ in range(2) for i in range(len(pairs))),
    }


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "DataLoader", "generator"])
def test_data_sets(kind):
    x, y = data()
    plain = mlp()
    plain.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
    for api, size in (({"micro_batch": 4}, 10), ({"every": 5}, 2)):
        model = bb.accumulate(mlp(), **api)
        steps = -(-22 // size) if kind == "generator" else None
        model.fit(sources(x, y, size)[kind], epochs=2, steps_per_epoch=steps, shuffle=False, verbose=0)
        close(model, plain)


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset"])
def test_class_weight_with_data_sets(kind):
    x, _ = data()
    y = np.random.default_rng(3).integers(0, 3, 22)
    options = {"epochs": 2, "shuffle": False, "verbose": 0, "class_weight": {0: 1.0, 1: 5.0, 2: 0.3}}

    def make():
        return mlp(keras.losses.SparseCategoricalCrossentropy(from_logits=True))

    plain = make()
    plain.fit(sources(x, y, 10)[kind], **options)  # Keras's weights for tf.data are float32, those for arrays are not
    for api, size in (({"micro_batch": 4}, 10), ({"every": 5}, 2)):
        model = bb.accumulate(make(), **api)
        model.fit(sources(x, y, size)[kind], **options)
        close(model, plain)


def test_validation_callbacks_and_steps():
    class Steps(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.ends, self.iterations = [], []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(batch)
            self.iterations.append(int(self.model.optimizer.iterations) if BACKEND != "jax" else None)

    x, y = data()
    seen = {}
    for name, api, size in (("plain", None, 10), ("split", {"micro_batch": 4}, 10), ("stream", {"every": 5}, 2)):
        model = mlp() if api is None else bb.accumulate(mlp(), **api)
        steps = Steps()
        logs = model.fit(
            x, y, batch_size=size, epochs=2, validation_split=0.25, validation_batch_size=7, callbacks=[steps],
            shuffle=False, verbose=0,
        ).history  # fmt: skip
        seen[name] = (logs, steps.ends, steps.iterations, model.evaluate(x, y, verbose=0), model.predict(x, verbose=0))
    for name in ("split", "stream"):
        same_logs(seen[name][0], seen["plain"][0])
        assert seen[name][1:3] == seen["plain"][1:3]
        np.testing.assert_allclose(seen[name][3], seen["plain"][3], rtol=1e-12)
        np.testing.assert_allclose(seen[name][4], seen["plain"][4], rtol=1e-12)


if BACKEND != "torch":  # where Keras has neither steps_per_execution nor its own compiler

    def test_steps_per_execution():
        parity(lambda: mlp(steps_per_execution=2), *data(43), epochs=1)

    def test_compiled():
        parity(lambda: mlp(jit_compile=True), *data(), epochs=1)


def test_eagerly():
    parity(lambda: mlp(run_eagerly=True), *data(12), epochs=1)


def test_before_compile_again_and_back():
    x, y = data()
    plain = mlp()
    fresh = mlp()
    steps = [lambda: plain.train_on_batch(x, y), lambda: fresh.train_on_batch(x, y)]
    for step in steps:
        step()
    bb.accumulate(fresh, every=3)
    bb.accumulate(fresh, micro_batch=5)
    fresh.compile(fresh.optimizer, "mse")
    plain.compile(plain.optimizer, "mse")
    for step in steps:
        step()
    close(fresh, plain)
    before = set(vars(mlp()))
    assert bb.accumulate(fresh, None) is fresh
    assert {"fit", "train_step", "make_train_function", "train_on_batch"}.isdisjoint(vars(fresh))
    assert set(vars(fresh)) - before <= {"_jax_state"}  # which fit leaves as well
    for step in steps:
        step()
    close(fresh, plain)


def test_a_saved_model_knows_nothing_of_bigbatch(tmp_path):
    x, y = data()
    for api in ({"micro_batch": 4}, {"every": 2}):
        model = bb.accumulate(mlp(), **api)
        model.fit(x, y, batch_size=10, verbose=0)
        model.save(tmp_path / "model.keras")
        assert "bigbatch" not in json.dumps(model.get_compile_config()) + model.to_json()
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert "train_step" not in vars(loaded)
        close(loaded, model)


LOADS = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "bigbatch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import keras
import numpy as np

model = keras.models.load_model(sys.argv[1])
arrays = np.load(sys.argv[2])
model.fit(arrays["x"], arrays["y"], batch_size=10, shuffle=False, verbose=0)
np.savez(sys.argv[2], *model.get_weights())
"""


def test_a_saved_model_trains_on_where_bigbatch_is_not_installed(tmp_path):
    x, y = (a.astype("float32") for a in data())
    model = bb.accumulate(mlp(), micro_batch=4)
    model.fit(x, y, batch_size=10, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "arrays.npz", x=x, y=y)
    paths = [str(tmp_path / name) for name in ("model.keras", "arrays.npz")]
    subprocess.run([sys.executable, "-c", LOADS, *paths], check=True)
    bb.accumulate(model, None).fit(x, y, batch_size=10, shuffle=False, verbose=0)
    with np.load(tmp_path / "arrays.npz") as trained:
        for name, ours in zip(trained.files, model.get_weights(), strict=True):
            np.testing.assert_allclose(trained[name], ours, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    """The weights stay float32, and loss scaling counts updates.

    What differs is what the 16 bits of one example's forward and backward round: at most a few of their roundings, of
    relative size eps, in each step. So the way from the start is compared, not the weights, and one that is wrong by a
    missing micro-batch is a tenth or more away.
    """
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)
    try:
        x, y = (a.astype("float32") for a in data(20))
        start = [array(v) for v in mlp().trainable_variables]
        plain = mlp()
        plain.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
        for api, size in (({"micro_batch": 4}, 10), ({"every": 5}, 2)):
            model = bb.accumulate(mlp(), **api)
            model.fit(x, y, batch_size=size, epochs=2, shuffle=False, verbose=0)
            assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
            assert int(array(model.optimizer.iterations)) == int(array(plain.optimizer.iterations)) > 0
            eps = {"mixed_float16": 2.0**-10, "mixed_bfloat16": 2.0**-7}[policy]
            for a, b, s in zip(model.trainable_variables, plain.trainable_variables, start, strict=True):
                assert a.dtype == "float32"
                way = np.linalg.norm(array(b) - s)
                assert way > 0
                assert np.linalg.norm(array(a) - array(b)) < 8 * eps * way, (a.path, api)
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])
    assert keras.config.dtype_policy() == before[1]
