"""Keras's two APIs, driven as a Keras user would; the three backends' adapters share it.

The stream's window is read and trained on in one call, so there is no open window to feed, save or look into: between
two steps of `fit` nothing is left over. So its adapter shows the laws whole windows, as the split API's does. What only
a stream can do (partial windows, `every`) is in tests/keras/test_stream.py.
"""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import keras
import numpy as np
from keras.src.backend.common import dtypes

import bigbatch.keras as bb
from conformance import jobs
from conformance.jobs import MicroBatch, Params, Spec
from conformance.wide import WIDTH, is_wide, narrowed, widened

BACKEND = keras.backend.backend()
DTYPES = {"float64": "float64", "float32": "float32", "half": "bfloat16"}
# On JAX and PyTorch Keras narrows what it promotes to float32; the laws need plain training to be in float64 as well.
dtypes.BIT64_TO_BIT32_DTYPE.pop("float64", None)
if BACKEND == "jax":
    import jax

    jax.config.update("jax_enable_x64", True)
if BACKEND == "torch":
    from torch.utils._python_dispatch import TorchDispatchMode as Mode
else:
    Mode = object


@keras.saving.register_keras_serializable("bigbatch")
class Shrink(keras.constraints.Constraint):
    def __init__(self, factor: float):
        self.factor = factor

    def __call__(self, w: Any) -> Any:
        return w * self.factor

    def get_config(self) -> dict[str, Any]:
        return {"factor": self.factor}


@keras.saving.register_keras_serializable("bigbatch")
class Rates(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, rates: Sequence[float]):
        self.rates = list(rates)

    def __call__(self, step: Any) -> Any:
        rates = keras.ops.convert_to_tensor(self.rates, dtype=keras.config.floatx())
        return keras.ops.take(rates, keras.ops.minimum(step, len(self.rates) - 1))

    def get_config(self) -> dict[str, Any]:
        return {"rates": self.rates}


@keras.saving.register_keras_serializable("bigbatch")
class Overwriting(keras.optimizers.SGD):
    """Takes the gradients' memory for its own use, where the backend's tensors have a memory to write to."""

    def _backend_update_step(self, grads: Any, trainable_variables: Any, learning_rate: Any) -> None:
        super()._backend_update_step(grads, trainable_variables, learning_rate)
        if BACKEND == "torch":
            for g in grads:
                g.fill_(float("nan"))


class Reached(Exception):
    """The optimizer was about to be applied."""


@keras.saving.register_keras_serializable("bigbatch")
class Loss(keras.losses.Loss):
    """The jobs' losses, one value an example."""

    def __init__(self, job: str = "net", **options: Any):
        super().__init__(**{"reduction": "mean_with_sample_weight", **options})
        self.job = job

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.square(y_pred - y_true) / 2 if self.job == "net" else y_pred

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "job": self.job}


@keras.saving.register_keras_serializable("bigbatch")
class Model(keras.Model):
    """The four jobs."""

    calls = 0
    inside: Callable[[], None] | None = None  # runs in every call, as code of a user's own would

    def __init__(self, job: str, shapes: dict[str, Sequence[int]], shrink: float | None = None, **options: Any):
        super().__init__(**options)
        self.job, self.shapes, self.shrink = job, {k: tuple(s) for k, s in shapes.items()}, shrink
        constraint = None if shrink is None else Shrink(shrink)
        for name, shape in self.shapes.items():
            setattr(self, name, self.add_weight(name=name, shape=shape, constraint=constraint))
        self.dropout = keras.layers.Dropout(0.5, dtype=self.dtype)
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        type(self).calls += 1  # Python runs this once a trace, or on PyTorch once a micro-batch
        if Model.inside is not None:
            Model.inside()
        ops = keras.ops
        if self.job == "net":
            return ops.matmul(ops.tanh(ops.matmul(x, self.a) + self.b), self.c)
        if self.job == "missing":
            w = self.w + ops.take(self.table, x["ids"], axis=0)
            w = w + x["has"][:, None] * self.extra
            return ops.sum(w * x["x"], axis=1)
        if self.job == "dropout":
            x = self.dropout(x, training=training)
        return ops.matmul(x, self.w)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "job": self.job, "shapes": self.shapes, "shrink": self.shrink}


@keras.saving.register_keras_serializable("bigbatch")
class WideModel(Model):
    """The same on matrices so large that on TensorFlow their gradients are deferred as factors."""

    def call(self, x: Any, training: bool = False) -> Any:
        if not is_wide(self.job):
            return super().call(x, training)
        Model.calls += 1
        if Model.inside is not None:
            Model.inside()
        ops = keras.ops
        if self.job == "dropout":
            x = self.dropout(x, training=training)
        x = ops.pad(x, [[0, 0], [0, WIDTH - x.shape[1]]])
        if self.job == "net":
            return ops.matmul(ops.tanh(ops.matmul(x, self.a) + self.b), self.c)[:, 0]
        return ops.matmul(x, self.w)[:, 0]


class Waits(Mode):
    """Counts what makes the host wait for a device; nothing inside a compiled function does."""

    READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


class KerasRun:
    model_class = Model
    kept: tuple[Params, list[np.ndarray]] | None = None  # what cannot be read inside a window

    def __init__(self, spec: Spec):
        self.spec = spec
        self.wide = self.model_class is WideModel and is_wide(spec.job)
        values = {name: widened(name, p) if self.wide else p for name, p in spec.params.items()}
        self.floatx = "float64" if spec.dtype == "float64" else "float32"
        keras.config.set_floatx(self.floatx)
        keras.utils.set_random_seed(spec.seed)
        shapes = {name: p.shape for name, p in values.items()}
        self.model = self.model_class(spec.job, shapes, spec.shrink, dtype=DTYPES[spec.dtype])
        for name, value in values.items():
            getattr(self.model, name).assign(value)
        options = {"adamw": {"weight_decay": spec.decay}, "momentum": {"momentum": 0.9}}.get(spec.optimizer, {})
        kind = {"adamw": keras.optimizers.AdamW, "overwriting": Overwriting}.get(spec.optimizer, keras.optimizers.SGD)
        optimizer = kind(Rates(spec.rates), global_clipnorm=spec.clip_norm, **options)
        if spec.ema is not None:
            optimizer = kind(
                Rates(spec.rates), global_clipnorm=spec.clip_norm, use_ema=True, ema_momentum=spec.ema, **options
            )
        self.model.compile(optimizer, Loss(spec.job))
        optimizer.build(self.model.trainable_variables)
        self.open()

    def open(self) -> None:
        """Installs the API, which `Plain` does not have."""

    def arrays(self, m: MicroBatch) -> tuple[Any, np.ndarray, np.ndarray]:
        """x, y and sample_weight. Data comes in the type of the loss; the model casts what it takes."""
        cast = {name: a.astype("int32" if name == "ids" else self.floatx) for name, a in m.items()}
        weight = cast.pop("weight")
        y = cast.pop("y", np.zeros(len(weight), self.floatx))
        return (cast if self.spec.job == "missing" else cast["x"]), y, weight

    def train(self, micro_batches: Sequence[MicroBatch]) -> float:
        """One update, and the loss that Keras logs."""
        keras.config.set_floatx(self.floatx)
        x, y, weight = self.arrays(jobs.join(micro_batches))
        return self.model.train_on_batch(x, y, weight)

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace:
        with quiet(self.spec):
            loss = float(self.train(micro_batches))
        items = jobs.items(jobs.join(micro_batches))
        skipped = None if np.isfinite(loss) else "not finite"
        return SimpleNamespace(micro_batches=len(micro_batches), items=items, loss=loss, skipped=skipped)

    def gradient(self, micro_batches: Sequence[MicroBatch]) -> dict[str, np.ndarray | None]:
        """The window up to its update: the same API and optimizer, stopped where it would be applied."""
        optimizer = self.model.optimizer

        def apply(*args: Any, **kwargs: Any) -> None:
            raise Reached

        # Uncompiled, or nothing would have run by then.
        optimizer.apply, self.model.run_eagerly, self.model.train_function = apply, True, None
        try:
            if BACKEND == "torch":
                self.step(micro_batches)  # without train_on_batch, which reads the loss
            else:
                self.train(micro_batches)
        except Reached:
            return {}
        finally:
            del optimizer.apply
            self.model.run_eagerly, self.model.train_function = False, None
        raise AssertionError("the window ended without an update")

    def step(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.model.train_step(self.tensors(jobs.join(micro_batches)))

    def tensors(self, m: MicroBatch) -> Any:
        return keras.tree.map_structure(keras.ops.convert_to_tensor, self.arrays(m))

    def params(self) -> Params:
        if self.kept is not None:
            return self.kept[0]
        return self.narrow({name: array(getattr(self.model, name)) for name in self.spec.params})

    def narrow(self, values: Params) -> Params:
        """In the shapes that the law gave."""
        return narrowed(values, self.spec.params) if self.wide else values

    def held(self) -> list[np.ndarray]:
        if self.kept is not None:
            return self.kept[1]
        return [array(v) for v in self.model.optimizer.variables]

    def updates(self) -> int:
        return int(self.model.optimizer.iterations)

    def ema(self) -> Params:
        averages = self.model.optimizer._model_variables_moving_average
        return self.narrow({name: array(v) for name, v in zip(self.spec.params, averages, strict=True)})

    def save(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            self.model.save(path)
            with open(path, "rb") as file:
                return file.read()

    def load(self, saved: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.keras")
            with open(path, "wb") as file:
                file.write(saved)
            self.model = keras.models.load_model(path)
        self.open()

    def acts(self) -> dict[str, Callable[[], None]]:
        """What a model's own code can do in an open window, and a callback between two steps."""
        model, rng = self.model, np.random.default_rng(13)
        weights = [rng.normal(size=p.shape) for p in self.spec.params.values()]
        if self.wide:
            weights = [widened(name, p) for name, p in zip(self.spec.params, weights, strict=True)]
        m = jobs.window(self.spec.job, (3,), seed=14)[0]

        def gradients() -> list[Any]:
            return [
                keras.ops.convert_to_tensor(w, v.dtype) for w, v in zip(weights, model.trainable_variables, strict=True)
            ]

        other = keras.optimizers.SGD(0.1)  # here, since on JAX none can be made inside

        def compiles() -> None:
            model.compile(other, Loss(self.spec.job))
            model.optimizer.build(model.trainable_variables)
            go_on(model)

        def train() -> None:
            x, y, weight = self.arrays(m)
            model.train_on_batch(x, y, weight)

        def evaluate() -> None:
            x, y, weight = self.arrays(m)
            model.evaluate(x, y, sample_weight=weight, verbose=0)

        acts = {
            "apply": lambda: model.optimizer.apply(gradients(), model.trainable_variables),
            "assign": lambda: model.trainable_variables[0].assign(weights[0]),
            "set_weights": lambda: model.set_weights(weights),
            "train_on_batch": train,
            "evaluate": evaluate,
            "compile": compiles,
            "build": lambda: model.optimizer.build(model.trainable_variables),
            "stop_training": lambda: setattr(model, "stop_training", True),
        }
        return {**acts, **(torch_acts(model) if BACKEND == "torch" else {})}

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> Any:
        """A window whose model does it. Uncompiled, so that Python runs for each micro-batch; on JAX it traces one."""
        if place == 0:
            act()
            return self.window(micro_batches)
        self.model._symbolic_build(data_batch=self.tensors(micro_batches[0]))  # which calls the model as well
        left = [1 if BACKEND == "jax" else place + 1]

        def inside() -> None:
            left[0] -= 1
            if left[0] == 0:
                act()

        if BACKEND == "jax":  # where `fit` has taken the values out of the variables
            self.kept = self.params(), self.held()
        self.model.run_eagerly, self.model.train_function, Model.inside = True, None, inside
        try:
            return self.window(micro_batches)
        finally:
            self.kept = Model.inside = None
            if BACKEND != "tensorflow":  # where compiling takes most of the time
                self.model.run_eagerly, self.model.train_function = False, None

    def watch(self, work: Callable[[], Any]) -> tuple[int, int]:
        if BACKEND == "torch":
            with Waits() as waits:
                work()
            return 0, waits.count
        before = Model.calls
        work()
        return Model.calls - before, 0


def torch_acts(model: keras.Model) -> dict[str, Callable[[], None]]:
    """What PyTorch's own functions do to gradients, and to parameters."""
    import torch

    def parameters() -> list[Any]:
        return [v.value for v in model.trainable_variables]

    def backward() -> None:
        sum(p.square().sum() for p in parameters()).backward()

    def write() -> None:
        with torch.no_grad():
            parameters()[0].mul_(2)

    return {
        "zero_grad": model.zero_grad,
        "backward": backward,
        "clip_grad_norm_": lambda: [None, torch.nn.utils.clip_grad_norm_(parameters(), 1e-3)][0],
        "in-place write": write,
    }


class Plain(KerasRun):
    pass


class Split(KerasRun):
    size: int | None = None

    def train(self, micro_batches: Sequence[MicroBatch]) -> float:
        self.install(micro_batches)
        return super().train(micro_batches)

    def step(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.install(micro_batches)
        super().step(micro_batches)

    def install(self, micro_batches: Sequence[MicroBatch]) -> None:
        if self.size != len(micro_batches[0]["x"]):
            self.size = len(micro_batches[0]["x"])
            bb.accumulate(self.model, micro_batch=self.size)

    def load(self, saved: bytes) -> None:
        super().load(saved)
        self.size = None


def go_on(model: keras.Model) -> None:
    """A window is a whole `fit` here: keep its end from writing the average to the weights, as for the last window."""
    model.optimizer.finalize_variable_values = lambda variables: None


class PlainFit(Plain):
    def open(self) -> None:
        go_on(self.model)

    def train(self, micro_batches: Sequence[MicroBatch]) -> float:
        keras.config.set_floatx(self.floatx)
        x, y, weight = self.arrays(jobs.join(micro_batches))
        return self.model.fit(x, y, sample_weight=weight, batch_size=len(y), shuffle=False, verbose=0).history["loss"][
            0
        ]


class Stream(KerasRun):
    def open(self) -> None:
        go_on(self.model)
        bb.accumulate(self.model, every=self.spec.every)

    def train(self, micro_batches: Sequence[MicroBatch]) -> float:
        """An epoch of one window, from a generator of micro-batches; a short one is the epoch's last."""
        keras.config.set_floatx(self.floatx)
        data = (self.arrays(m) for m in micro_batches)
        return self.model.fit(data, steps_per_epoch=len(micro_batches), shuffle=False, verbose=0).history["loss"][0]

    def step(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.model.train_step([self.tensors(m) for m in micro_batches])


class PlainWide(Plain):
    model_class = WideModel


class SplitProducts(Split):
    """Each window that is traced proves that it deferred products: the same numbers could come without."""

    model_class = WideModel

    def train(self, micro_batches: Sequence[MicroBatch]) -> float:
        from bigbatch.fused import keras_tensorflow

        self.install(micro_batches)
        in_graph = self.model.train_function is None and not self.model.run_eagerly
        can = self.wide and self.spec.dtype != "half" and len(micro_batches) > 1 and self.size <= 8
        plain = keras_tensorflow.DeferredSum
        with mock.patch.object(keras_tensorflow, "DeferredSum", wraps=plain) as deferred:
            loss = super().train(micro_batches)
        assert deferred.called or not (in_graph and can), "no product was deferred"
        return loss


class SplitSmallProducts(Split):
    """Each finite window of weights that are multiplied proves that it was fused."""

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace:
        from conformance.torch_products import must_fuse

        can = self.spec.job == "net" and self.spec.dtype != "half"
        can = can and all(np.isfinite(a).all() for m in micro_batches for a in m.values())
        with must_fuse(len(micro_batches) if can else 0):
            return super().window(micro_batches)

    def train(self, micro_batches: Sequence[MicroBatch]) -> float:
        from conformance.torch_products import small_ones_too

        with small_ones_too():
            return super().train(micro_batches)

    def step(self, micro_batches: Sequence[MicroBatch]) -> None:
        from conformance.torch_products import small_ones_too

        with small_ones_too():
            super().step(micro_batches)


def array(v: Any) -> np.ndarray:
    return np.array(keras.ops.convert_to_numpy(v)).astype(np.float64)


@contextlib.contextmanager
def quiet(spec: Spec) -> Any:
    """Keras warns of a variable without a gradient, which the job `missing` has on purpose."""
    with warnings.catch_warnings():
        if spec.job == "missing":
            warnings.filterwarnings("ignore", message="Gradients do not exist for variables")
        yield


class Adapter:
    door, half = "split", "bfloat16"
    absent = BACKEND != "jax"  # where JAX has zeros
    refusal = ValueError

    def __init__(self, name: str, start: type[KerasRun], plain: type[KerasRun]):
        self.name, self.start, self.plain = f"keras_{BACKEND}-{name}", start, plain
        keras.config.set_floatx("float32")
        self.model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1)])
        self.model.compile("sgd", "mse")
        self.options: dict[str, Any] = {"every": 2} if name.startswith("stream") else {"micro_batch": 2}

    def mistakes(self) -> dict[str, Callable[[], Any]]:
        x, y = np.ones((8, 2), "float32"), np.ones((7, 1), "float32")

        def train(x: Any, y: Any = None) -> Any:
            return bb.accumulate(self.model, **self.options).train_on_batch(x, y)

        return {
            "micro_batch=0": lambda: bb.accumulate(self.model, micro_batch=0),
            "micro_batch=2.5": lambda: bb.accumulate(self.model, micro_batch=2.5),
            "micro_batch='Auto'": lambda: bb.accumulate(self.model, micro_batch="Auto"),
            "lengths": lambda: train(x, y),
            "empty": lambda: train(x[:0], y[:0]),
        }

    def untouched(self) -> Params:
        return {v.path: array(v) for v in [*self.model.variables, *self.model.optimizer.variables]}


ADAPTERS = [Adapter("split", Split, Plain), Adapter("stream", Stream, PlainFit)]
try:  # where products are deferred: in what both APIs hand their micro-batches to
    import bigbatch.fused  # noqa: F401

    if BACKEND != "jax":
        run = {"tensorflow": (SplitProducts, PlainWide), "torch": (SplitSmallProducts, Plain)}[BACKEND]
        ADAPTERS.append(Adapter("split-products", *run))
except ModuleNotFoundError:  # --hide-fused
    pass
