"""One random Keras model, window, option and foreign act, beside plain Keras on the whole batch in float64.

Models are compiled once and trained again from their first weights, for compiling is what takes time. An act comes
before the window, from a callback or from the data, or inside of it, from the model's own code: there Python must run
for each micro-batch, which it does on PyTorch and in uncompiled models; on JAX it runs once a trace.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from hypothesis import strategies as st
from keras import layers, ops

import bigbatch.keras as bb
from conformance.keras_driver import BACKEND, array, torch_acts

ROWS, MICRO = 8, 2
METHODS = [
    {"micro_batch": 3},
    {"micro_batch": 4},
    {"every": 2},
    {"every": 3, "partial": "apply"},
    {"every": 3, "partial": "carry"},
    {"every": 3, "partial": "drop"},
]
INSIDE: list[Callable[[], None]] = []


class Hook(layers.Layer):
    """Where code of others runs."""

    def call(self, x: Any) -> Any:
        for act in INSIDE[:1]:
            act()
        return x


def linear(x: Any) -> Any:
    return layers.Dense(3)(x)


def tied(x: Any) -> Any:
    dense = layers.Dense(4, "tanh")
    return layers.Dense(3)(dense(dense(x)))


def convolution(x: Any) -> Any:
    x = layers.Conv1D(2, 2, activation="tanh", padding="same")(layers.Reshape((4, 1))(x))
    return layers.Dense(3)(layers.Flatten()(x))


def embedding(x: Any) -> Any:
    ids = ops.cast(ops.clip(ops.abs(x) * 2, 0, 4), "int32")
    return layers.Dense(3)(layers.Flatten()(layers.Embedding(5, 2)(ids)))


def regularized(x: Any) -> Any:
    return layers.Dense(3, kernel_regularizer="l2")(layers.Dense(4, "tanh", activity_regularizer=None)(x))


MODELS = [linear, tied, convolution, embedding, regularized]
LOSSES = ["sum_over_batch_size", "mean_with_sample_weight", "sum"]
OPTIMIZERS = [
    lambda: keras.optimizers.SGD(0.1),
    lambda: keras.optimizers.SGD(0.05, momentum=0.9, global_clipnorm=1.0),
    lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-3),
]


class Trained:
    """A model with its first values."""

    def __init__(self, kind: Callable[[Any], Any], recipe: int, eager: bool, how: dict[str, Any] | None):
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        keras.utils.set_random_seed(3)
        x = keras.Input((4,))
        self.model = keras.Model(x, kind(Hook()(x)))
        loss = keras.losses.MeanSquaredError(reduction=LOSSES[recipe % len(LOSSES)])
        self.model.compile(OPTIMIZERS[recipe % len(OPTIMIZERS)](), loss, run_eagerly=eager)
        self.model.optimizer.build(self.model.trainable_variables)
        # Which calls the model as well, and is not inside of a window.
        self.model._symbolic_build(data_batch=tuple(np.ones((ROWS, *shape)) for shape in ((4,), (3,), ())))
        self.variables = [*self.model.trainable_variables, *self.model.optimizer.variables]
        self.first = self.values()
        if how is not None:
            bb.accumulate(self.model, **how)

    def values(self) -> list[np.ndarray]:
        return [array(v) for v in self.variables]

    def set(self, values: list[np.ndarray]) -> None:
        for v, value in zip(self.variables, values, strict=True):
            v.assign(value)


@functools.cache
def trained(kind: int, recipe: int, eager: bool, method: int | None) -> Trained:
    return Trained(MODELS[kind], recipe, eager, None if method is None else METHODS[method])


def windows(how: dict[str, Any], epochs: int) -> list[slice | np.ndarray]:
    """The rows of each update."""
    if "micro_batch" in how:
        return [np.arange(ROWS)] * epochs
    made, held = [], []
    for _ in range(epochs):
        for start in range(0, ROWS, MICRO):
            held.append(np.arange(start, start + MICRO))
            if len(held) == how["every"]:
                made.append(np.concatenate(held))
                held = []
        partial = how.get("partial", "apply")
        if held and partial == "apply":
            made.append(np.concatenate(held))
        if partial != "carry":
            held = []
    return made


def train(one: Trained, how: dict[str, Any], arrays: Any, epochs: int) -> None:
    x, y, weight = arrays
    if "micro_batch" in how:
        for _ in range(epochs):
            one.model.train_on_batch(x, y, weight)
        return
    one.model.fit(
        x, y, sample_weight=weight, batch_size=MICRO, epochs=epochs,
        shuffle=False, verbose=0,
    )  # fmt: skip


def expected(plain: Trained, start: list[np.ndarray], how: dict[str, Any], arrays: Any, epochs: int) -> Any:
    """What plain Keras makes of the same windows; a window that is not finite, or of no weight, makes no update."""
    plain.set(start)
    counts = plain.model.loss.reduction == "mean_with_sample_weight"
    for rows in windows(how, epochs):
        x, y, weight = (a[rows] for a in arrays)
        finite = all(np.isfinite(a).all() for a in (x, y, weight))
        none = not weight.any() and not plain.model.losses  # a regularizer needs no weight
        if finite and not (counts and ((weight < 0).any() or none)):
            plain.model.train_on_batch(x, y, weight)
    return plain.values()


def same(ours: list[np.ndarray], right: list[np.ndarray], what: str) -> None:
    for i, (a, b) in enumerate(zip(ours, right, strict=True)):
        off = np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-3)
        assert off < 1e-12, f"{what}: variable {i} is off by {off:.2g}"


def acts(one: Trained, rng: np.random.Generator) -> dict[str, Callable[[], Any]]:
    model = one.model
    variables = model.trainable_variables
    some = [rng.normal(size=v.shape) for v in variables]
    x, y = rng.normal(size=(ROWS, 4)), rng.normal(size=(ROWS, 3))
    others = model.get_weights()[len(some) :]  # here: JAX refuses to read an array while it traces
    made = {
        "apply": lambda: model.optimizer.apply([ops.convert_to_tensor(s) for s in some], variables),
        "assign": lambda: variables[0].assign(some[0]),
        "set_weights": lambda: model.set_weights([*some, *others]),
        "evaluate": lambda: model.evaluate(x, y, batch_size=ROWS, verbose=0),
        "build": lambda: model.optimizer.build(variables),
        "exception": lambda: 1 // 0,
    }
    return {**made, **(torch_acts(model) if BACKEND == "torch" else {})}


def inside(act: Callable[[], Any], place: int) -> Callable[[], None]:
    """The act, at one call of the model."""
    left = [place]

    def once() -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    return once


@contextlib.contextmanager
def quietly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def example(data: st.DataObject) -> None:
    """Draws one, and raises AssertionError at a third outcome."""
    draw = data.draw
    kind = draw(st.integers(0, len(MODELS) - 1))
    recipe = draw(st.integers(0, 2)) if BACKEND == "torch" else kind % 3  # so that compiling does not take most of it
    if MODELS[kind] is embedding and BACKEND == "tensorflow":
        recipe = 0  # plain Keras takes the others' squares and norms without adding up an id's several rows
    method = draw(st.integers(0, len(METHODS) - 1))
    where = draw(
        st.sampled_from(["nowhere", "between", "data", *(["inside"] if BACKEND == "torch" or kind < 2 else [])])
    )
    # On TensorFlow only an uncompiled window runs Python for each micro-batch.
    eager = where == "inside" and BACKEND == "tensorflow"
    how, epochs = METHODS[method], 3 if METHODS[method].get("partial") == "carry" else draw(st.integers(1, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ours, plain = trained(kind, recipe, eager, method), trained(kind, recipe, False, None)
    arrays = rng.normal(size=(ROWS, 4)), rng.normal(size=(ROWS, 3)), rng.uniform(0.1, 3, ROWS)
    with quietly():
        ours.set(ours.first)
        if where == "data":
            bad = draw(st.sampled_from(["nan", "inf", "negative", "no weight"]))
            row = draw(st.integers(0, ROWS - 1))
            if bad == "nan" or bad == "inf":
                arrays[draw(st.sampled_from([1, 2]))][row] = float(bad)
            else:
                arrays[2][row if bad == "negative" else slice(None)] = -1.0 if bad == "negative" else 0.0
        if where == "between":
            possible = acts(ours, rng)
            del possible["exception"]
            possible[draw(st.sampled_from(sorted(possible)))]()
        start = ours.values()
        if where == "inside":
            disturbed(draw, ours, plain, start, how, arrays, rng)
            start = ours.values()
        train(ours, how, arrays, epochs)
        same(ours.values(), expected(plain, start, how, arrays, epochs), f"{MODELS[kind].__name__} {how} {where}")


def disturbed(draw: Any, ours: Trained, plain: Trained, start: Any, how: Any, arrays: Any, rng: Any) -> None:
    """A window with an act inside; what it made is checked, and what comes after is the next window."""
    possible = acts(ours, rng)
    name = draw(st.sampled_from(sorted(possible)))
    place = 1 if BACKEND == "jax" else draw(st.integers(1, 3))
    if BACKEND == "jax":
        ours.model.train_function = None
    first = windows(how, 1)[0]
    one = tuple(a[first] for a in arrays)
    INSIDE.append(inside(possible[name], place))
    try:
        if "micro_batch" in how:
            ours.model.train_on_batch(*one)
        else:
            x, y, weight = one
            ours.model.fit(x, y, sample_weight=weight, batch_size=MICRO, shuffle=False, verbose=0)
    except ZeroDivisionError:
        same(ours.values(), start, f"{name} inside")
    except RuntimeError as error:
        said = str(error)
        if name not in said:
            raise AssertionError(f"{name} is not named: {said}") from error
        if name != "in-place write":  # which has written
            same(ours.values(), start, f"{name} inside, refused")
    else:
        INSIDE.clear()  # the plain model has such a layer too
        plain.set(start)
        plain.model.train_on_batch(*one)
        same(ours.values(), plain.values(), f"{name} inside, accepted")
    finally:
        INSIDE.clear()
        if BACKEND == "jax":
            ours.model.train_function = None
