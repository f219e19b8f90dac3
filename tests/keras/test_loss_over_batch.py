"""`loss_over="batch"`: plain `fit`'s update for losses that compare the examples of a batch, in micro-batches."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import bigbatch.keras as bb
from conformance.keras_driver import array
from conformance.keras_parity import BACKEND, close, data, float64, same_logs

N, D = 22, 3


@pytest.fixture(autouse=True)
def _float64():
    float64()


def both(make, *arrays, size=11, micro_batch=4, epochs=1, relative=1e-12, **options):
    """Fits plainly, and with the loss over the batch; batches of 11 in micro-batches of 4, 4 and 3."""
    options = {"epochs": epochs, "verbose": 0, "shuffle": False, "batch_size": size, **options}
    plain, ours = make(), bb.accumulate(make(), micro_batch=micro_batch, loss_over="batch")
    logs = plain.fit(*arrays, **options).history
    same_logs(ours.fit(*arrays, **options).history, logs, relative)
    close(ours, plain, relative)
    return plain, ours


def halves(y_pred):
    return y_pred[:, :D], y_pred[:, D:]


def normalized(x):
    return x / ops.sqrt(ops.sum(x * x, 1, keepdims=True))


def count(a):
    return ops.cast(ops.shape(a)[0], a.dtype)


def own(a):
    places = ops.arange(ops.shape(a)[0])
    return ops.cast(ops.equal(places[:, None], places[None]), a.dtype)


@keras.saving.register_keras_serializable("bigbatch")
def info_nce(y, y_pred):
    a, b = map(normalized, halves(y_pred))
    logits = 3 * ops.matmul(a, ops.transpose(b))
    return -ops.sum(own(a) * (ops.log_softmax(logits, 1) + ops.log_softmax(logits, 0)), 1) / 2


def siglip(y, y_pred):
    a, b = map(normalized, halves(y_pred))
    logits = 3 * ops.matmul(a, ops.transpose(b)) - 1
    return ops.mean(ops.softplus(-(2 * own(a) - 1) * logits), 1)


def supervised(y, y_pred):
    a, b = halves(y_pred)
    labels = ops.cast(y[:, 0] > 0, a.dtype)
    same = ops.cast(ops.equal(labels[:, None], labels[None]), a.dtype) - own(a)
    logits = ops.matmul(a, ops.transpose(a)) - 1e9 * own(a)
    return ops.mean(b * b) - ops.sum(same * ops.log_softmax(logits, 1), 1) / (ops.sum(same, 1) + 1)


def triplet(y, y_pred):
    a, b = halves(y_pred)
    distances = ops.sum((a[:, None] - b[None]) ** 2, -1)
    return ops.softplus(ops.sum(own(a) * distances, 1) - ops.min(distances + 1e9 * own(a), 1))


def barlow(y, y_pred):
    a, b = ((x - ops.mean(x, 0)) / (ops.sqrt(ops.mean((x - ops.mean(x, 0)) ** 2, 0)) + 0.1) for x in halves(y_pred))
    return ops.sum((ops.matmul(ops.transpose(a), b) / count(a) - ops.eye(D, dtype=a.dtype)) ** 2)


def ranking(y, y_pred):
    a, b = halves(y_pred)
    scores, order = ops.sum(a * b, 1), y[:, 0]
    return ops.mean(ops.softplus((scores - scores[:, None]) * ops.sign(order[:, None] - order)), 1)


def towers(loss=info_nce, tied=False, before=(), compiled=None, **options):
    """Two encoders of one input's halves, which return both embeddings side by side."""
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    first = [layers.Dense(5, activation="tanh"), *[make() for make in before], layers.Dense(D)]
    second = first if tied else [layers.Dense(5, activation="tanh"), layers.Dense(D)]
    ends = []
    for stack, h in ((first, x[:, :2]), (second, x[:, 2:])):
        for layer in stack:
            h = layer(h)
        ends.append(h)
    model = keras.Model(x, ops.concatenate(ends, 1))
    model.compile(**{"optimizer": keras.optimizers.SGD(0.5, momentum=0.9), "loss": loss, **options})
    return model


@pytest.mark.parametrize(
    ("loss", "tied"),
    [(info_nce, False), (info_nce, True), (siglip, False), (supervised, False), (triplet, True), (barlow, False),
     (ranking, False)],
)  # fmt: skip
def test_coupled_losses_are_plain_fits(loss, tied):
    both(lambda: towers(loss, tied), *data(N))


def test_metrics_weights_and_classes():
    x, y = data(N)
    weights = np.random.default_rng(2).uniform(0.1, 3, N)
    make = lambda: towers(info_nce, metrics=[ranking], weighted_metrics=[triplet])  # noqa: E731
    both(make, x, y, sample_weight=weights)
    labels = np.random.default_rng(3).integers(0, 2, N)

    def of_classes():
        model = towers(keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        return model

    both(of_classes, x, labels, class_weight={0: 1.0, 1: 5.0})


def test_several_outputs_and_their_losses_logs():
    def make():
        keras.utils.set_random_seed(0)
        x = keras.Input((4,))
        h = layers.Dense(5, activation="tanh")(x)
        model = keras.Model(x, {"pairs": layers.Dense(2 * D, name="pairs")(h), "head": layers.Dense(D, name="head")(h)})
        model.compile("sgd", {"pairs": info_nce, "head": "mse"}, loss_weights={"pairs": 0.3, "head": 2.0},
                      metrics={"head": ["mae"]})  # fmt: skip
        return model

    x, y = data(N)
    both(make, x, {"pairs": y, "head": y})


class Activity(layers.Layer):
    def call(self, x):
        self.add_loss(ops.mean(x**2))
        return x


def test_added_losses_and_regularizers():
    def make():
        before = [Activity, lambda: layers.Dense(5, kernel_regularizer="l2", activity_regularizer="l1")]
        return towers(info_nce, before=before)

    both(make, *data(N))


class WithTemperature(keras.Model):
    """A learned temperature that only the loss reads, in a compute_loss of the model's own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(D), layers.Dense(D)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        return ops.concatenate([self.a(x), self.b(x)], 1)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        a, b = map(normalized, halves(y_pred))
        logits = ops.exp(self.scale) * ops.matmul(a, ops.transpose(b))
        return -ops.mean(ops.sum(own(a) * ops.log_softmax(logits, 1), 1))


def test_a_learned_temperature_in_compute_loss():
    def make():
        keras.utils.set_random_seed(0)
        model = WithTemperature()
        model(np.zeros((1, 4)))
        model.compile(keras.optimizers.SGD(0.5))
        return model

    _, ours = both(make, *data(N))
    assert abs(float(array(ours.scale)) - 1) > 1e-6


def test_masks_of_the_outputs_are_joined():
    tokens = np.random.default_rng(4).integers(1, 9, (N, 6))
    tokens[:, 3:] *= np.random.default_rng(5).integers(0, 2, (N, 3))

    def make():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((6,)), layers.Embedding(9, 5, mask_zero=True), layers.Dense(9)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    both(make, tokens, tokens)


@pytest.mark.parametrize("micro_batch", [1, 5, 11, 50])
def test_any_cut(micro_batch):
    both(lambda: towers(), *data(N), micro_batch=micro_batch, epochs=2)


@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has neither")
@pytest.mark.parametrize("how", ["jit_compile", "run_eagerly"])
def test_compiled_and_eagerly(how):
    if how == "jit_compile" and BACKEND == "jax":
        pytest.skip("it is compiled in the other tests")
    both(lambda: towers(before=[lambda: layers.Dropout(0.0)], **{how: True}), *data(N))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_lengths_that_the_graph_does_not_know():
    """A data set whose batches differ in length."""
    import tensorflow as tf

    x, y = data(N)
    plain, ours = towers(), bb.accumulate(towers(), micro_batch=4, loss_over="batch")
    batches = tf.data.Dataset.from_generator(
        lambda: ((x[i:j], y[i:j]) for i, j in ((0, 8), (8, 11), (11, 22))),
        output_signature=(tf.TensorSpec([None, 4], x.dtype), tf.TensorSpec([None, 3], y.dtype)),
    )
    for model in (plain, ours):
        model.fit(batches, verbose=0, shuffle=False)
    for a, b in zip(ours.variables, plain.variables, strict=True):  # plain Keras may count a step after the last batch
        np.testing.assert_allclose(array(a), array(b), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:BatchNormalization normalizes over each micro-batch")
def test_randomness_is_drawn_again_and_averages_move_once():
    """Against the same micro-batches in one graph: an update of a model that is called on them, one after the other."""
    noisy = [lambda: layers.Dropout(0.5, seed=3), lambda: layers.BatchNormalization(momentum=0.5)]

    class InParts(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, x, training=None):
            parts = [self.inner(x[i : i + 4], training=training) for i in range(0, 11, 4)]
            return ops.concatenate(parts)

    def make():
        return towers(before=noisy)

    x, y = data(11)
    plain, ours = InParts(make()), bb.accumulate(make(), micro_batch=4, loss_over="batch")
    plain.compile(keras.optimizers.SGD(0.5, momentum=0.9), info_nce)
    for _ in range(2):
        one, two = plain.train_on_batch(x, y), ours.train_on_batch(x, y)
        np.testing.assert_allclose(two, one, rtol=1e-12)
    for a, b in zip(ours.variables, plain.inner.variables, strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-12, atol=1e-12, err_msg=a.path)


def test_unseeded_draws_are_the_same_in_both_runs():
    """A layer without a seed: with one weight and no bias the gradient shows whether the masks agree."""

    def make():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((1,)), layers.Dense(64, use_bias=False), layers.Dropout(0.5)])
        model.compile(keras.optimizers.SGD(1.0), lambda y, y_pred: ops.sum(y_pred, 1))
        return model

    model = bb.accumulate(make(), micro_batch=2, loss_over="batch")
    before = array(model.trainable_variables[0])
    x = np.ones((4, 1))
    loss = model.train_on_batch(x, x)
    gradient = before - array(model.trainable_variables[0])
    np.testing.assert_allclose((gradient * before).sum(), loss, rtol=1e-10)  # the loss is linear in the weights


def test_nothing_is_warned_of_a_coupled_loss(recwarn):
    bb.accumulate(towers(), micro_batch=4, loss_over="batch").fit(*data(N), batch_size=11, verbose=0)
    assert not [w for w in recwarn if "compares the examples" in str(w.message)]


def test_a_window_that_is_not_finite_makes_no_update():
    x, y = data(N)
    model = bb.accumulate(towers(), micro_batch=4, loss_over="batch")
    model.fit(x, y, batch_size=11, verbose=0)
    before = [array(v) for v in model.trainable_variables]
    x[0] = np.nan
    model.train_on_batch(x[:11], y[:11])
    assert all(np.array_equal(a, array(v)) for a, v in zip(before, model.trainable_variables, strict=True))
    x, y = data(N)
    model.train_on_batch(x[:11], y[:11])
    assert all(not np.array_equal(a, array(v)) for a, v in zip(before, model.trainable_variables, strict=True))


def test_16_bits():
    """Half-precision variables and a loss scale: near the float64 update."""
    keras.config.set_floatx("float32")
    right, ours = towers(optimizer=keras.optimizers.SGD(0.5)), towers(optimizer=keras.optimizers.SGD(0.5))
    keras.config.set_dtype_policy("mixed_float16")
    half = towers(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=1024.0))
    half.set_weights(right.get_weights())
    x, y = (v.astype("float32") for v in data(11))
    right.train_on_batch(x, y)
    for model, allowed in ((ours, 1e-5), (half, 3e-2)):
        bb.accumulate(model, micro_batch=4, loss_over="batch").train_on_batch(x, y)
        for a, b in zip(model.trainable_variables, right.trainable_variables, strict=True):
            np.testing.assert_allclose(array(a), array(b), atol=allowed)


def test_copies_and_giving_it_back():
    import copy

    x, y = data(N)
    first = bb.accumulate(towers(), micro_batch=4, loss_over="batch")
    first.train_on_batch(x, y)
    ours = copy.deepcopy(first)
    plain = bb.accumulate(first, None)
    assert "train_step" in ours.__dict__
    assert "train_step" not in plain.__dict__
    for model in (plain, ours):
        model.train_on_batch(x, y)
    close(ours, plain)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"micro_batch": 4, "loss_over": "window"}, "loss_over must be one of 'micro_batch', 'batch'."),
        ({"every": 4, "loss_over": "batch"}, "loss_over='batch' needs micro_batch as a number."),
        ({"micro_batch": "auto", "loss_over": "batch"}, "loss_over='batch' needs micro_batch as a number."),
        ({"micro_batch": None, "loss_over": "batch"}, "loss_over='batch' needs micro_batch as a number."),
        ({"micro_batch": 4, "noise": True, "loss_over": "batch"}, "The noise is measured from the micro-batches'"),
    ],
)
def test_bad_input(options, text):
    model = towers()
    with pytest.raises(ValueError, match=text.replace("'", ".").replace(".", r".")):
        bb.accumulate(model, **options)
    assert "train_step" not in model.__dict__


def test_the_audit_names_it_and_has_tried_it():
    x, y = data(12)
    found = bb.audit(towers(before=[lambda: layers.Dropout(0.0)]), x, y, micro_batch=4)
    (cause,) = found.causes
    assert cause.kind == "coupling"
    assert 'Pass loss_over="batch" to bb.accumulate: seen to be the full batch\'s gradient, to ' in cause.remedy
    assert not found.exact
