"""Every optimizer that Keras ships, with a schedule, an average, decay and clipping, beside plain `fit`.

One model has a tower for each of them, which that optimizer alone trains: so a few compilations serve them all.
"""

import keras
import numpy as np
from keras import optimizers

import bigbatch.keras as bb
from conformance.keras_driver import Rates, array
from conformance.keras_parity import BACKEND, close, float64, mlp

SHIPPED = [
    kind
    for kind in vars(optimizers).values()
    if isinstance(kind, type)
    and issubclass(kind, optimizers.Optimizer)
    and kind not in (optimizers.Optimizer, optimizers.LossScaleOptimizer, optimizers.MultiOptimizer)
]
VARIANTS = [
    *[(kind, {}) for kind in SHIPPED],
    (optimizers.SGD, {"momentum": 0.9}),
    (optimizers.SGD, {"momentum": 0.9, "nesterov": True}),
    (optimizers.RMSprop, {"momentum": 0.9, "centered": True}),
    (optimizers.Adam, {"amsgrad": True}),
]
CLIPPING = [{"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.05}]
# Each with each on PyTorch, where that takes a second; elsewhere in turn, since Keras clips before any of them sees it.
TOWERS = [
    (kind, {**options, **clipping})
    for i, (kind, options) in enumerate(VARIANTS)
    for clipping in (CLIPPING if BACKEND == "torch" else [CLIPPING[i % 3]])
]


class Linear(keras.losses.Loss):
    """Its gradient is the data."""

    def call(self, y_true, y_pred):
        return keras.ops.sum(y_true * y_pred, axis=-1)


class Squares(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.sum(keras.ops.square(y_true - y_pred), axis=-1)


def towers(activation, loss):
    """A compiled model with a tower for each variant and kind of clipping, and what trains each."""
    keras.utils.set_random_seed(0)
    rates = Rates([0.1, 0.03, 0.01])
    made = [kind(rates, weight_decay=0.02, use_ema=True, ema_momentum=0.9, **options) for kind, options in TOWERS]
    x = keras.Input((4,))
    outputs = [keras.layers.Dense(3, activation, name=f"tower{i}")(x) for i in range(len(made))]
    model = keras.Model(x, keras.layers.Concatenate()(outputs))
    of_tower = optimizers.MultiOptimizer(lambda variable: made[int(variable.path.split("/")[0][5:])])
    # Eagerly where tracing takes longer. Built, since plain Keras on TensorFlow would build it while it traces the
    # first step, and ScheduleFreeAdamW would then start from zero.
    model.compile(of_tower, loss, run_eagerly=BACKEND == "tensorflow")
    model.optimizer.build(model.trainable_variables)
    return model


def compare(plain, other, relative):
    """What each optimizer holds and trains, named by it."""
    for i, (ours, theirs) in enumerate(zip(other.optimizer.optimizers, plain.optimizer.optimizers, strict=True)):
        said = f"{theirs.name} {TOWERS[i][1]}"
        own = [*other.trainable_variables[2 * i : 2 * i + 2], *ours.variables]
        for a, b in zip(own, [*plain.trainable_variables[2 * i : 2 * i + 2], *theirs.variables], strict=True):
            np.testing.assert_allclose(array(a), array(b), rtol=relative, atol=relative, err_msg=f"{said}: {a.path}")


def test_in_float64():
    """Three updates of micro-batches whose last is shorter."""
    float64()
    rng = np.random.default_rng(0)
    fit = {"x": rng.normal(size=(30, 4)), "y": rng.normal(size=(30, 3 * len(TOWERS))), "shuffle": False, "verbose": 0}
    plain = towers("tanh", Squares())
    start = [array(v) for v in plain.trainable_variables]
    plain.fit(**fit, batch_size=10)
    assert not any(np.allclose(array(v), s) for v, s in zip(plain.trainable_variables, start, strict=True))
    for api, size in (({"micro_batch": 4}, 10), ({"every": 5}, 2)):
        ours = bb.accumulate(towers("tanh", Squares()), **api)
        ours.fit(**fit, batch_size=size)
        compare(plain, ours, 1e-12)


def test_in_float32():
    """Eighths, and weights whose sums are powers of two: the gradients are exact, and so every optimizer sees the same.

    XLA compiles two programs, and may contract a product with its sum in one of them: the few dozen roundings of an
    update are then others, γ₄₀ of what they round in each of three.
    """
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-64, 65, size=(42, n)) / 8 for n in (4, 3 * len(TOWERS)))
    weight = np.tile(np.repeat([0.5, 2, 1, 1], [4, 4, 4, 2]), 3)
    fit = {"x": x, "y": y, "sample_weight": weight, "batch_size": 14, "shuffle": False, "verbose": 0}
    plain = towers(None, Linear(reduction="mean_with_sample_weight"))
    ours = bb.accumulate(towers(None, Linear(reduction="mean_with_sample_weight")), micro_batch=4)
    plain.fit(**fit)
    ours.fit(**fit)
    compare(plain, ours, 3 * 40 * 2.0**-24 if BACKEND == "jax" else 0)


def test_loss_scaling():
    """A scale that grows with each second update, and a window whose scaled gradients are inf."""
    float64()
    rng = np.random.default_rng(0)
    fit = {"x": rng.normal(size=(40, 4)), "y": rng.normal(size=(40, 3)), "shuffle": False, "verbose": 0}
    fit["y"][10] = 1e200  # inf, once scaled and squared

    def make():
        inner = optimizers.AdamW(Rates([0.1, 0.03]), global_clipnorm=0.1, use_ema=True, ema_momentum=0.9)
        return mlp(optimizer=optimizers.LossScaleOptimizer(inner, initial_scale=2.0**10, dynamic_growth_steps=2))

    plain = make()
    plain.fit(**fit, batch_size=10)
    for api, size in (({"micro_batch": 4}, 10), ({"every": 5}, 2)):
        ours = bb.accumulate(make(), **api)
        ours.fit(**fit, batch_size=size)
        close(ours, plain)
        assert 0 < int(array(ours.optimizer.inner_optimizer.iterations)) < 4
