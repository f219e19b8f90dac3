"""Compiled models whose truth is known: is accumulation exact, and if not, why?

Each entry is a function that returns (model, data for fit), with what an audit must say of it.
"""

import keras
import numpy as np
from keras import layers, ops

from specimens import Zoo

N, D, CLASSES, MICRO_BATCH = 14, 6, 4, 4  # the last micro-batch is ragged


ZOO = Zoo()
specimen = ZOO.specimen


def rng():
    return np.random.default_rng(0)


def examples():
    return rng().normal(size=(N, D)), rng().integers(CLASSES, size=N)


def sentences():
    """Token ids of 1 to 6 tokens, 0 where there is none, and labels."""
    draw = rng()
    ids, labels = draw.integers(1, 12, (N, 6)), draw.integers(CLASSES, size=(N, 6))
    ids[np.arange(6) >= draw.integers(1, 7, (N, 1))] = 0
    return ids, labels


def compiled(model, loss=None, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True) if loss is None else loss
    model.compile(keras.optimizers.SGD(0.1), loss, **options)
    return model


def stack(*inner, **options):
    ends = [layers.Dense(8, name="first"), *inner, layers.Activation("tanh"), layers.Dense(CLASSES, name="last")]
    return compiled(keras.Sequential([keras.Input((D,)), *ends]), **options)


class Own(keras.Model):
    """Two layers, and a compute_loss that is given."""

    def __init__(self, compute, units=CLASSES, token=False):
        super().__init__()
        self.compute, self.units = compute, units
        self.first = layers.Embedding(12, 8) if token else layers.Dense(8, "tanh")
        self.last = layers.Dense(units)

    def call(self, x):
        return self.last(self.first(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.compute(x, y, y_pred)


def own(compute, **options):
    model = Own(compute, **options)
    model.compile(keras.optimizers.SGD(0.1))
    return model


def each(y, y_pred):
    return keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)


# Exact.


@specimen(exact=True)
def a_plain_network():
    return stack(), examples()


@specimen(exact=True)
def layer_normalization_and_metrics():
    return stack(layers.LayerNormalization(), metrics=["accuracy"]), examples()


@specimen(exact=True)
def a_masked_lstm():
    tokens = layers.Embedding(12, D, mask_zero=True)
    model = keras.Sequential([keras.Input((6,)), tokens, layers.LSTM(4, return_sequences=True), layers.Dense(CLASSES)])
    return compiled(model), sentences()


@specimen(exact=True)
def two_outputs_with_weights():
    x = keras.Input((D,))
    hidden = layers.Dense(8, "tanh")(x)
    model = keras.Model(x, {"a": layers.Dense(CLASSES, name="a")(hidden), "b": layers.Dense(1, name="b")(hidden)})
    loss = {"a": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "b": "mse"}
    inputs, labels = examples()
    return compiled(model, loss, loss_weights={"a": 1.0, "b": 0.3}), (
        inputs,
        {"a": labels, "b": rng().normal(size=(N, 1))},
        rng().uniform(0.5, 2, N),
    )


class MeanOfSquares(layers.Layer):
    def call(self, x):
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


@specimen(exact=True)
def regularizers_and_a_mean_added():
    dense = layers.Dense(8, "tanh", kernel_regularizer="l2", activity_regularizer=keras.regularizers.L1(0.01))
    return stack(dense, MeanOfSquares()), examples()


@specimen(exact=True)
def tied_layers():
    ids = keras.Input((5,))
    tokens, mix = layers.Embedding(12, D), layers.Dense(D, "tanh", name="mix")
    model = keras.Model(ids, layers.Dense(12)(mix(mix(tokens(ids)))))
    given = rng().integers(12, size=(N, 6))
    return compiled(model), (given[:, :-1], given[:, 1:])


@specimen(exact=True)
def tokens_with_weights():
    model = keras.Sequential([keras.Input((6,)), layers.Embedding(12, D), layers.Dense(CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    ids, labels = sentences()
    return compiled(model, loss), (ids, labels, (ids > 0).astype(float) * rng().uniform(0.5, 2, ids.shape))


@specimen(exact=True)
def a_compiled_sum():
    return stack(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")), examples()


@specimen(exact=True)
def batch_normalization_that_is_frozen():
    return stack(layers.BatchNormalization(trainable=False)), examples()


@specimen(exact=True, stochastic=("drop",))
def dropout():
    return stack(layers.Dropout(0.3, name="drop")), examples()


# The model's doing.


@specimen(exact=False, module=("norm",))
def batch_normalization():
    return stack(layers.BatchNormalization(name="norm")), examples()


@specimen(exact=False, module=("outer", "inner"))
def batch_normalization_at_two_depths():
    inside = keras.Sequential([layers.Dense(8, "tanh"), layers.BatchNormalization(name="inner")], name="block")
    return stack(layers.BatchNormalization(name="outer"), inside), examples()


@specimen(exact=False, stochastic=("drop",), module=("norm",))
def dropout_and_batch_normalization():
    return stack(layers.BatchNormalization(name="norm"), layers.Dropout(0.3, name="drop")), examples()


@specimen(exact=False, module=("whiten",))
def a_normalization_that_no_list_of_names_has():
    class Whiten(layers.Layer):
        def call(self, x):
            return (x - ops.mean(x, 0)) / (ops.std(x, 0) + 1)

    return stack(Whiten(name="whiten")), examples()


# The loss's doing.


@specimen(exact=False, sum=())
def a_compute_loss_that_is_a_sum():
    return own(lambda x, y, y_pred: ops.sum(each(y, y_pred))), examples()


@specimen(exact=False, sum=())
def a_sum_added():
    class SumOfSquares(layers.Layer):
        def call(self, x):
            self.add_loss(1e-2 * ops.sum(ops.square(x)))
            return x

    return stack(SumOfSquares()), examples()


@specimen(exact=False, coupling=())
def info_nce():
    def compute(x, y, y_pred):
        a, b = (z / ops.norm(z, axis=1, keepdims=True) for z in ops.split(y_pred, 2, axis=1))
        return ops.mean(each(ops.arange(ops.shape(a)[0]), ops.matmul(a, ops.transpose(b)) / 0.2))

    return own(compute, units=10), examples()


@specimen(exact=False, coupling=())
def a_contrastive_loss_added():
    class Spread(layers.Layer):
        def call(self, x):
            self.add_loss(ops.mean(ops.tanh(ops.matmul(x, ops.transpose(x)))))
            return x

    return stack(Spread()), examples()


@specimen(exact=False, items=())
def a_loss_that_takes_the_mean_over_tokens_itself():
    def loss(y, y_pred):
        counted = ops.cast(y >= 0, y_pred.dtype)
        return ops.sum(each(ops.maximum(y, 0), y_pred) * counted) / ops.sum(counted)

    ids, labels = sentences()
    model = keras.Sequential([keras.Input((6,)), layers.Embedding(12, D), layers.Dense(CLASSES)])
    return compiled(model, loss), (ids, np.where(ids > 0, labels, -1))


@specimen(exact=False, not_finite=())
def a_micro_batch_of_padding_alone():
    def compute(x, y, y_pred):
        counted = ops.cast(x > 0, y_pred.dtype)
        return ops.sum(each(y, y_pred) * counted) / ops.sum(counted)

    ids, labels = sentences()
    ids[MICRO_BATCH : 2 * MICRO_BATCH] = 0
    return own(compute, token=True), (ids, labels)


@specimen(exact=False, order=())
def a_loss_that_looks_at_places():
    def compute(x, y, y_pred):
        weights = ops.cast(ops.arange(1, ops.shape(x)[0] + 1), y_pred.dtype)
        return ops.sum(each(y, y_pred) * weights) / ops.sum(weights)

    return own(compute), examples()
