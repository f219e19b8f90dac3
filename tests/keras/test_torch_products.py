"""On PyTorch, weights' gradients are taken from autograd and go straight into the sums."""

import keras
import numpy as np
import pytest
from keras import layers

import bigbatch.keras as bb
from conformance import jobs, keras_driver
from conformance.keras_parity import BACKEND, close, float64, same_logs

RNG = np.random.default_rng(0)
X, Y = RNG.integers(11, size=(23, 5)), RNG.normal(size=(23, 2))

if BACKEND == "torch":
    from bigbatch.fused import torch_backward, torch_limits
    from bigbatch.fused.torch_deferred import DeferredSum

    def set_limits(monkeypatch, **changes):
        monkeypatch.setattr(torch_limits, "LIMITS", torch_limits.LIMITS._replace(**changes))

    @pytest.fixture
    def taken(monkeypatch):
        """The shapes of the weights that were taken."""
        shapes = []

        class Noting(DeferredSum):
            def product(self, weight, left, right):
                shapes.append(tuple(weight.shape))
                super().product(weight, left, right)

            def rows(self, weight, indices, gradients, padding):
                shapes.append(tuple(weight.shape))
                super().rows(weight, indices, gradients, padding)

        monkeypatch.setattr(torch_backward, "DeferredSum", Noting)
        set_limits(monkeypatch, cpu_elements=0, rows=32, smaller=0)
        float64()
        return shapes

    def words(twice=False, regularizer=None):
        """An embedding, a layer on three dimensions, and one on two that may be used twice."""
        keras.utils.set_random_seed(0)
        x = keras.Input((5,), dtype="int32")
        h = layers.Dense(7, activation="tanh", kernel_regularizer=regularizer)(layers.Embedding(11, 6)(x))
        middle = layers.Dense(35, activation="tanh")
        h = middle(layers.Flatten()(h))
        model = keras.Model(x, layers.Dense(2)(middle(h) if twice else h))
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
        return model

    ALL = {(11, 6), (6, 7), (35, 35), (35, 2)}

    @pytest.mark.parametrize("api", ["split", "stream"])
    @pytest.mark.parametrize("twice", [False, True])
    def test_the_update_is_the_batchs(api, twice, taken):
        plain, model = words(twice), words(twice)
        logs = plain.fit(X, Y, batch_size=23, shuffle=False, verbose=0).history
        if api == "split":
            bb.accumulate(model, micro_batch=3)
            ours = model.fit(X, Y, batch_size=23, shuffle=False, verbose=0).history
        else:
            bb.accumulate(model, every=8)
            ours = model.fit(X, Y, batch_size=3, shuffle=False, verbose=0).history
        same_logs({k: v[0] for k, v in ours.items()}, {k: v[0] for k, v in logs.items()}, 1e-12)
        close(model, plain, 1e-12)
        assert set(taken) == ALL

    def test_a_regularized_weight_is_autograds(taken):
        plain, model = words(regularizer="l2"), bb.accumulate(words(regularizer="l2"), micro_batch=3)
        for trained in (plain, model):
            trained.train_on_batch(X, Y)
        close(model, plain, 1e-12)
        assert (6, 7) not in taken

    def test_a_measured_window_is_autograds(taken):
        model = bb.accumulate(words(), micro_batch=3, noise=1)
        model.fit(X, Y, batch_size=23, shuffle=False, verbose=0)
        assert taken == []
        assert bb.noise_scale(model).windows == 1

    def test_one_micro_batch_is_autograds(taken):
        model = bb.accumulate(words(), micro_batch=32)
        model.fit(X, Y, batch_size=23, shuffle=False, verbose=0)
        assert taken == []

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_mixed_precision(policy, taken, monkeypatch):
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(policy)
        results = []
        for worth in (True, False):
            set_limits(monkeypatch, cpu_elements=0 if worth else 1 << 60)
            model = bb.accumulate(words(), micro_batch=3)
            model.train_on_batch(X, Y)
            results.append(model.get_weights())
        for ours, autograds in zip(*results, strict=True):
            np.testing.assert_allclose(ours, autograds, atol=100 * 2.0**-10 * np.abs(autograds).max())
        assert set(taken) == ALL

    def test_a_window_that_is_not_finite_has_no_effect(taken):
        plain, model = words(), bb.accumulate(words(), micro_batch=3)
        bad = Y.copy()
        bad[11] = np.nan
        model.train_on_batch(X, bad)
        for trained in (plain, model):
            trained.train_on_batch(X, Y)
        close(model, plain, 1e-12)

    def test_the_laws_run_with_products_and_without(taken, monkeypatch):
        found = []
        for kind in (keras_driver.Split, keras_driver.SplitSmallProducts):
            set_limits(monkeypatch, cpu_elements=1 << 60)
            taken.clear()
            run = kind(jobs.Spec("net", jobs.params("net")))
            run.window(jobs.window("net", (4, 4, 2), seed=0))
            found.append(len(taken))
        assert found[0] == 0
        assert found[1] >= 2
