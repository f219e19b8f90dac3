"""On TensorFlow and JAX large weights' gradients are deferred as factors: which ones, and when."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import bigbatch.keras as bb
from conformance import jobs, keras_driver
from conformance.keras_parity import BACKEND, close, float64, same_logs

MICRO = 2
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(150, 96)), RNG.normal(size=(150, 2))


@pytest.fixture(autouse=True)
def _float64():
    float64()


def deep(loss="mse", **options):
    """Three dense layers, of which the first two have weight gradients much larger than what they are products of."""
    keras.utils.set_random_seed(0)
    widths = [layers.Dense(64, activation="tanh", **options) for _ in range(2)]
    model = keras.Sequential([keras.Input((96,)), *widths, layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0), loss, metrics=["mae"])
    return model


if BACKEND == "tensorflow":
    from bigbatch.fused import keras_tensorflow

    @pytest.fixture
    def seen(monkeypatch):
        """The shapes of the products that were found."""
        shapes = []
        look = keras_tensorflow.factored_grad

        def noting(gradient):
            product = look(gradient)
            shapes.extend([] if product is None else [product.shape])
            return product

        monkeypatch.setattr(keras_tensorflow, "factored_grad", noting)
        return shapes

    def test_the_laws_run_with_products_and_without(seen):
        found = []
        for kind in (keras_driver.Split, keras_driver.SplitProducts):
            seen.clear()
            run = kind(jobs.Spec("net", jobs.params("net")))
            run.window(jobs.window("net", (4, 4, 2), seed=0))
            found.append(len(seen))
        assert found[0] == 0
        assert found[1] >= 2

    # Of micro-batches of 2, thirteen products take three quarters of the gradients' memory, and four a quarter.
    @pytest.mark.parametrize(
        ("n", "api"), [(17, "split"), (75, "split"), (75, "one call"), (17, "stream"), (150, "stream")]
    )
    def test_factors_are_buffered_up_to_their_capacity(n, api, seen):
        plain, model = (
            deep(),
            bb.accumulate(deep(), **({"every": -(-n // MICRO)} if api == "stream" else {"micro_batch": MICRO})),
        )
        logs = plain.train_on_batch(X[:n], Y[:n], return_dict=True)
        if api == "one call":
            ours = model.train_on_batch(X[:n], Y[:n], return_dict=True)
        else:  # where the graph does not know how many examples there are
            size = MICRO if api == "stream" else n
            history = model.fit(X[:n], Y[:n], batch_size=size, shuffle=False, verbose=0).history
            ours = {name: values[0] for name, values in history.items()}
        same_logs(ours, logs, 1e-10)
        close(model, plain, 1e-10)
        assert seen[:2] == [(96, 64), (64, 64)]

    def test_a_batch_may_be_shorter_than_a_micro_batch():
        plain, model = deep(), bb.accumulate(deep(), micro_batch=8)
        for trained in (plain, model):
            trained.fit(X[:25], Y[:25], batch_size=20, shuffle=False, verbose=0)
        close(model, plain, 1e-10)

    def test_each_kind_of_items_has_products_of_its_own(seen):
        def make():
            keras.utils.set_random_seed(0)
            x = keras.Input((96,))
            h = layers.Dense(64, activation="tanh")(layers.Dense(64, activation="tanh")(x))
            model = keras.Model(x, [layers.Dense(2, name="a")(h), layers.Dense(2, name="b")(h)])
            weighted = keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
            model.compile(
                keras.optimizers.SGD(0.1), [weighted, keras.losses.MeanSquaredError(reduction="sum")], [0.7, 0.1]
            )
            return model

        weight = RNG.uniform(0.1, 3, 40)
        plain, model = make(), bb.accumulate(make(), micro_batch=MICRO)
        for trained in (plain, model):  # of a length that the graph knows: another would be traced for
            trained.train_on_batch(X[:40], [Y[:40]] * 2, [weight] * 2)
        close(model, plain, 1e-10)
        assert seen[:4] == [(96, 64), (64, 64)] * 2

    def test_weights_used_twice_and_regularized_are_added_up_as_they_come(seen):
        def make():
            keras.utils.set_random_seed(0)
            twice = layers.Dense(64, activation="tanh")
            x = keras.Input((96,))
            h = twice(twice(layers.Dense(64, activation="tanh", kernel_regularizer="l2")(x)))
            h = layers.Dense(64, name="on_three_dimensions")(layers.Reshape((1, 64))(h))
            model = keras.Model(x, layers.Dense(2)(layers.Flatten()(h)))
            model.compile(keras.optimizers.SGD(0.1), "mse")
            return model

        plain, model = make(), bb.accumulate(make(), micro_batch=MICRO)
        for trained in (plain, model):
            trained.train_on_batch(X[:17], Y[:17])
        close(model, plain, 1e-10)
        assert set(seen) == {(64, 64)}
        assert len(seen) <= 2, "the one on three dimensions, and once more where TensorFlow traces again"

    @pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
    def test_factors_in_half_precision_are_not_kept(policy, seen):
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(policy)
        bb.accumulate(deep(), micro_batch=MICRO).train_on_batch(X[:8], Y[:8])
        assert seen == []

    def test_eager_and_xla_have_none(seen):
        for options in ({"run_eagerly": True}, {"jit_compile": True}):
            model = deep()
            model.compile(keras.optimizers.SGD(0.1), "mse", **options)
            bb.accumulate(model, micro_batch=MICRO).train_on_batch(X[:8], Y[:8])
        assert seen == []

    def test_noise_is_measured_of_them_too(seen):
        """In one window of two; eagerly nothing is deferred, and the gradients are there to be measured."""
        found = []
        for eagerly in (False, True):
            model = deep()
            model.run_eagerly = eagerly
            bb.accumulate(model, micro_batch=MICRO, noise=2)
            model.fit(X[:26], Y[:26], batch_size=13, epochs=2, shuffle=False, verbose=0)
            found.append(bb.noise_scale(model))
            assert seen
        assert [scale.windows for scale in found] == [2, 2]
        assert found[0].trace == pytest.approx(found[1].trace, rel=1e-12)
        assert found[0].squared_norm == pytest.approx(found[1].squared_norm, rel=1e-10)

    def test_lengths_that_all_differ_are_added_up_as_they_come(seen):
        lengths = (3, 1, 2, 5, 4)
        stops = np.cumsum(lengths)
        cuts = [slice(stop - n, stop) for n, stop in zip(lengths, stops, strict=True)]
        plain, model = deep(), bb.accumulate(deep(), every=len(cuts))
        model.fit(((X[c], Y[c]) for c in cuts), steps_per_epoch=len(cuts), shuffle=False, verbose=0)
        plain.fit(X[:15], Y[:15], batch_size=15, shuffle=False, verbose=0)
        close(model, plain, 1e-10)
        assert seen == []

    def test_a_window_that_is_not_finite_has_no_effect():
        model, plain = bb.accumulate(deep(), micro_batch=MICRO), deep()
        bad = X[:16].copy()
        bad[9] = np.inf
        model.train_on_batch(bad, Y[:16])
        for ours, untouched in zip(model.get_weights(), plain.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, untouched)
        model.train_on_batch(X[:16], Y[:16])
        plain.train_on_batch(X[:16], Y[:16])
        close(model, plain, 1e-10)

    def test_a_window_of_one_multiplies_rows_by_a_transposed_matrix_as_keras_does(monkeypatch):
        """Seven rows, which TensorFlow's two ways round differently; larger windows take the other way."""
        keras.config.set_floatx("float32")
        rng = np.random.default_rng(0)
        x = rng.normal(size=(7, 300)).astype("float32")

        def trained(ours):
            keras.utils.set_random_seed(0)
            dense = [layers.Dense(300, activation="tanh") for _ in range(3)]
            model = keras.Sequential([keras.Input((300,)), *dense])
            model.compile(keras.optimizers.SGD(0.1), "mse")
            if ours:
                bb.accumulate(model, micro_batch=7)
            model.fit(x, x, batch_size=14, shuffle=False, verbose=0)
            return model.get_weights()

        plain = trained(ours=False)
        for w, v in zip(trained(ours=True), plain, strict=True):
            np.testing.assert_array_equal(w, v)
        fast = keras_tensorflow.with_fast_products
        monkeypatch.setattr(keras_tensorflow, "with_fast_products", lambda graph, _, found: fast(graph, True, found))
        assert any(np.any(w != v) for w, v in zip(trained(ours=True), plain, strict=True))

    def test_there_are_never_two_copies_of_the_gradients():
        command = [sys.executable, str(Path(__file__).with_name("peak.py")), "50", "16"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        copies = float(done.stdout.split()[-2])
        assert 0.9 < copies < 1.9, done.stdout


if BACKEND == "jax":
    from bigbatch.fused import jax_deferred

    @pytest.fixture
    def seen(monkeypatch):
        """For each window that is traced, the shapes of the products that were found."""
        shapes = []
        look = jax_deferred._parts

        def noting(traced, zeros, count):
            parts, group, program = look(traced, zeros, count)
            products = [part for several in parts for part in several if isinstance(part, jax_deferred.FactoredGrad)]
            shapes.append([tuple(sorted(part.dot.outvars[0].aval.shape)) for part in products])
            return parts, group, program

        monkeypatch.setattr(jax_deferred, "_parts", noting)
        return shapes

    # Of micro-batches of 2, fourteen take three quarters of the larger gradient's memory, and twelve the smaller's.
    @pytest.mark.parametrize(
        ("n", "api", "products"),
        [(17, "split", 2), (5, "split", 0), (27, "split", 1), (75, "split", 0), (17, "stream", 2), (75, "stream", 0)],
    )
    def test_factors_are_kept_up_to_their_capacity(n, api, products, seen):
        option = {"every": -(-n // MICRO)} if api == "stream" else {"micro_batch": MICRO}
        plain, model = deep(), bb.accumulate(deep(), **option)
        logs = plain.train_on_batch(X[:n], Y[:n], return_dict=True)
        size = MICRO if api == "stream" else n
        history = model.fit(X[:n], Y[:n], batch_size=size, shuffle=False, verbose=0).history
        same_logs({name: values[0] for name, values in history.items()}, logs, 1e-10)
        close(model, plain, 1e-10)
        assert seen == [[(64, 96), (64, 64)][:products]]

    def test_weights_used_twice_regularized_and_on_three_dimensions(seen):
        def make():
            keras.utils.set_random_seed(0)
            twice = layers.Dense(64, activation="tanh")
            x = keras.Input((96,))
            h = twice(twice(layers.Dense(64, activation="tanh", kernel_regularizer="l2")(x)))
            h = layers.Dense(64)(layers.Reshape((1, 64))(h))
            model = keras.Model(x, layers.Dense(2)(layers.Flatten()(h)))
            model.compile(keras.optimizers.SGD(0.1), "mse")
            return model

        plain, model = make(), bb.accumulate(make(), micro_batch=MICRO)
        for trained in (plain, model):
            trained.train_on_batch(X[:17], Y[:17])
        close(model, plain, 1e-10)
        assert seen == [[(64, 96), (64, 64), (64, 64), (64, 64)]]

    def test_where_noise_is_measured_gradients_are_made(seen):
        bb.accumulate(deep(), micro_batch=MICRO, noise=True).train_on_batch(X[:16], Y[:16])
        assert seen == [[]]
