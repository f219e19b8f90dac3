"""TensorFlow 2's two APIs in custom loops, driven as their users would: a tf.function a step, Keras optimizers.

Both also on matrices so large that their gradients are stored as factors.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.func_graph import FuncGraph

import bigbatch.tensorflow as bb
from conformance import jobs
from conformance.jobs import MicroBatch, Params, Spec
from conformance.mistakes import at_the_split_door, at_the_stream_door
from conformance.wide import WIDTH, is_wide, narrowed, widened

# Two CPUs for the tests of tf.distribute: it has to be said before TensorFlow runs anything.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
CPUS = ["CPU:0", "CPU:1"]

DTYPES = {"float64": tf.float64, "float32": tf.float32, "half": tf.bfloat16}


class Model(tf.Module):
    """The four jobs."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.job = spec.job
        self.noise = tf.random.Generator.from_seed(spec.seed)
        constraint = None if spec.shrink is None else lambda v: v * spec.shrink
        self.weights = {
            name: tf.Variable(value, dtype=DTYPES[spec.dtype], name=name, constraint=constraint)
            for name, value in spec.params.items()
        }

    def __call__(self, m: dict[str, tf.Tensor]) -> tf.Tensor:
        x, p = m["x"], self.weights
        if self.job == "net":
            return (tf.linalg.matvec(tf.tanh(x @ p["a"] + p["b"]), p["c"]) - m["y"]) ** 2 / 2
        if self.job == "missing":
            w = p["w"] + tf.gather(p["table"], m["ids"]) + m["has"][:, None] * p["extra"]
            return tf.reduce_sum(w * x, 1)
        if self.job == "dropout":
            x = tf.where(self.noise.uniform(tf.shape(x)) < 0.5, 2 * x, 0)
        return tf.linalg.matvec(x, p["w"])

    def loss(self, m: dict[str, tf.Tensor]) -> tf.Tensor:
        return tf.tensordot(self(m), m["weight"] / tf.reduce_sum(m["weight"]), 1)


class WideModel(Model):
    """The same on wide matrices, where the job has one."""

    def __init__(self, spec: Spec):
        wide = {name: widened(name, value) for name, value in spec.params.items()}
        super().__init__(replace(spec, params=wide if is_wide(spec.job) else spec.params))

    def __call__(self, m: dict[str, tf.Tensor]) -> tf.Tensor:
        if not is_wide(self.job):
            return super().__call__(m)
        x, p = m["x"], self.weights
        if self.job == "dropout":
            x = tf.where(self.noise.uniform(tf.shape(x)) < 0.5, 2 * x, 0)
        x = tf.pad(x, [[0, 0], [0, WIDTH - x.shape[1]]])
        if self.job == "net":
            return ((tf.tanh(x @ p["a"] + p["b"]) @ p["c"])[:, 0] - m["y"]) ** 2 / 2
        return (x @ p["w"])[:, 0]


class Rates(tf.keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, rates: tuple[float, ...]):
        self.rates = tf.constant(rates, tf.float64)  # in float32 a rate of 0.1 is off by 1.5e-8

    def __call__(self, step: Any) -> tf.Tensor:
        return self.rates[tf.minimum(tf.cast(step, tf.int32), len(self.rates) - 1)]


class Overwriting(tf.keras.optimizers.SGD):
    """Tensors cannot be overwritten; a gradient handed over as a variable could."""

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        pairs = list(grads_and_vars)
        super().apply_gradients(pairs)
        for g, _ in pairs:
            if isinstance(g, tf.Variable):
                g.assign(tf.fill(g.shape, tf.cast(math.nan, g.dtype)))


@contextlib.contextmanager
def counted(owner: type, method: str) -> Iterator[list[str]]:
    """Notes each call of a method."""
    calls, real = [], getattr(owner, method)

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(method)
        return real(self, *args, **kwargs)

    setattr(owner, method, counting)
    try:
        yield calls
    finally:
        setattr(owner, method, real)


class TensorFlowRun:
    model_class = Model

    def __init__(self, spec: Spec):
        self.spec = spec
        self.model = self.model_class(spec)
        self.variables = list(self.model.weights.values())
        options: dict[str, Any] = {"learning_rate": Rates(spec.rates), "global_clipnorm": spec.clip_norm}
        if spec.ema is not None:
            options |= {"use_ema": True, "ema_momentum": spec.ema}
        if spec.optimizer == "adamw":
            self.optimizer = tf.keras.optimizers.AdamW(weight_decay=spec.decay, **options)
        else:
            kind = Overwriting if spec.optimizer == "overwriting" else tf.keras.optimizers.SGD
            self.optimizer = kind(momentum=0.9 if spec.optimizer == "momentum" else 0.0, **options)
        self.optimizer.build(self.variables)
        self.checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer)

    def tensors(self, m: MicroBatch) -> dict[str, tf.Tensor]:
        return {name: tf.constant(a, tf.int32 if name == "ids" else DTYPES[self.spec.dtype]) for name, a in m.items()}

    def params(self) -> Params:
        return self.narrow({name: v.numpy().astype(np.float64) for name, v in self.model.weights.items()})

    def narrow(self, values: Any) -> Any:
        """In the shapes that the law gave."""
        wide = self.model_class is WideModel and is_wide(self.spec.job)
        return narrowed(values, self.spec.params) if wide else values

    def held(self) -> list[np.ndarray]:
        return [v.numpy() for v in self.optimizer.variables]

    def updates(self) -> int:
        return int(self.optimizer.iterations.numpy())

    def ema(self) -> Params:
        averages = self.optimizer._model_variables_moving_average
        return self.narrow({name: v.numpy() for name, v in zip(self.model.weights, averages, strict=True)})

    def acts(self) -> dict[str, Callable[[], None]]:
        # Of a wide matrix only what the law knows: the rest must stay zero.
        given = {name: np.ones_like(value) for name, value in self.spec.params.items()}
        wide = self.model_class is WideModel and is_wide(self.spec.job)
        ones = [
            tf.constant(widened(name, one) if wide else one, v.dtype)
            for (name, one), v in zip(given.items(), self.variables, strict=True)
        ]

        def accumulator() -> None:
            other = bb.Accumulator(tf.keras.optimizers.SGD(0.25), every=1)
            other.apply_gradients(zip(ones, self.variables, strict=True), items=1)

        return {
            "apply_gradients": lambda: self.optimizer.apply_gradients(zip(ones, self.variables, strict=True)),
            "assign": lambda: self.variables[1].assign_add(ones[1]),
            "Accumulator": accumulator,
        }

    def save(self) -> Path:
        return Path(self.checkpoint.write(str(Path(tempfile.mkdtemp()) / "checkpoint")))

    def load(self, saved: Path) -> None:
        self.checkpoint.read(str(saved)).assert_existing_objects_matched()

    def watch(self, work: Callable[[], Any]) -> tuple[int, int]:
        """Every graph that is built is a trace; every value of a tensor that Python reads, a wait."""
        with counted(FuncGraph, "__init__") as traces, counted(type(tf.constant(0)).__mro__[1], "_numpy") as waits:
            work()
        return len(traces), len(waits)


class Plain(TensorFlowRun):
    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.step = tf.function(self.train_step)

    def train_step(self, batch: Any) -> None:
        with tf.GradientTape() as tape:
            loss = self.model.loss(batch)
        gradients = tape.gradient(loss, self.variables)
        self.optimizer.apply_gradients(
            [(g, v) for g, v in zip(gradients, self.variables, strict=True) if g is not None]
        )

    def window(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.step(self.tensors(jobs.join(micro_batches)))


class Stream(TensorFlowRun):
    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.acc = bb.Accumulator(self.optimizer, every=spec.every, partial=spec.partial)
        if spec.job != "missing":
            self.acc.build(self.variables)  # the step is traced once, and a restored window can be flushed at once
        self.checkpoint = tf.train.Checkpoint(model=self.model, optimizer=self.optimizer, acc=self.acc)
        self.step = tf.function(self.train_step, reduce_retracing=True)
        self.fed = 0

    def train_step(self, m: Any) -> bb.Update:
        with tf.GradientTape() as tape:
            loss = self.model.loss(m)
        gradients = tape.gradient(loss, self.variables)
        return self.acc.apply_gradients(
            zip(gradients, self.variables, strict=True), items=tf.reduce_sum(m["weight"]), loss=loss
        )

    def feed(self, micro_batch: MicroBatch) -> bb.Update | None:
        update = self.step(self.tensors(micro_batch))
        self.fed += 1
        return update if self.fed % self.spec.every == 0 else None

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace:
        return report([self.feed(m) for m in micro_batches][-1])

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> SimpleNamespace:
        updates = []
        for i, m in enumerate(micro_batches):
            if i == place:
                act()
            try:
                updates.append(self.feed(m))
            except Exception:
                self.fed = self.pending
                raise
        return report(updates[-1])

    def flush(self) -> SimpleNamespace | None:
        update = self.acc.flush()
        self.fed = self.pending
        return None if update is None else report(update)

    def reset(self) -> None:
        self.acc.reset()
        self.fed = 0

    def load(self, saved: Path) -> None:
        super().load(saved)
        self.fed = self.pending

    @property
    def pending(self) -> int:
        return int(self.acc.pending)


def report(update: bb.Update) -> SimpleNamespace:
    return SimpleNamespace(
        micro_batches=int(update.micro_batches),
        items=float(update.items),
        loss=float(update.loss),
        skipped=update.skipped,
    )


class Split(TensorFlowRun):
    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.step = tf.function(self.train_step)
        self.door = tf.function(self.value_and_grad)

    def value_and_grad(self, batch: Any, micro_batch: int) -> Any:
        def loss_fn(m: Any) -> Any:
            return self.model.loss(m), tf.reduce_sum(m["weight"])

        return bb.value_and_grad(loss_fn, batch, self.variables, micro_batch=micro_batch)

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> SimpleNamespace:
        """Outside a tf.function, where a loss function is called once a micro-batch."""
        calls = []

        def loss_fn(m: Any) -> Any:
            if len(calls) == place:
                act()
            calls.append(place)
            return self.model.loss(m), tf.reduce_sum(m["weight"])

        batch = self.tensors(jobs.join(micro_batches))
        loss, gradients = bb.value_and_grad(loss_fn, batch, self.variables, micro_batch=len(micro_batches[0]["x"]))
        self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))
        return SimpleNamespace(micro_batches=len(calls), items=None, loss=float(loss), skipped=None)

    def train_step(self, batch: Any, micro_batch: int) -> tf.Tensor:
        loss, gradients = self.value_and_grad(batch, micro_batch)
        if tf.math.is_finite(loss):
            self.optimizer.apply_gradients(
                [(g, v) for g, v in zip(gradients, self.variables, strict=True) if g is not None]
            )
        return loss

    def gradient(self, micro_batches: Sequence[MicroBatch]) -> dict[str, np.ndarray | None]:
        _, gradients = self.door(self.tensors(jobs.join(micro_batches)), len(micro_batches[0]["x"]))
        return self.narrow(dict(zip(self.model.weights, gradients, strict=True)))

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace:
        batch = jobs.join(micro_batches)
        loss = float(self.step(self.tensors(batch), len(micro_batches[0]["x"])))
        skipped = None if math.isfinite(loss) else f"loss {loss}"
        return SimpleNamespace(micro_batches=len(micro_batches), items=jobs.items(batch), loss=loss, skipped=skipped)


class PlainWide(Plain):
    model_class = WideModel


class SplitProducts(Split):
    """Each window that is traced proves that it deferred products: the same numbers could come without."""

    model_class = WideModel

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace:
        from bigbatch.fused import tensorflow_split

        traces, flush = self.step.experimental_get_tracing_count(), tensorflow_split._flushed
        with mock.patch.object(tensorflow_split, "_flushed", wraps=flush) as flushed:
            report = super().window(micro_batches)
        if stores_factors(self.spec) and self.step.experimental_get_tracing_count() > traces:
            assert flushed.called, "no product was deferred"
        return report


class StreamProducts(Stream):
    """Each micro-batch inside a window proves that its factors were stored."""

    model_class = WideModel

    def rows(self) -> list[int]:
        """How many rows of factors each large sum has."""
        from bigbatch.fused.tensorflow import DeferredSum

        return [len(one.left.read_value()) for one in self.acc._sums if isinstance(one, DeferredSum)]

    def feed(self, micro_batch: MicroBatch) -> bb.Update | None:
        before, update = self.rows() if self.fed % self.spec.every else [0], super().feed(micro_batch)
        length = len(micro_batch["x"])
        if stores_factors(self.spec) and self.fed % self.spec.every and length <= 4 and max(before) + length <= 16:
            assert min(self.rows(), default=0) >= length, "no product was deferred"
        return update


def stores_factors(spec: Spec) -> bool:
    """Whether a wide run has gradients that are products, in the dtype that they are added up in."""
    return is_wide(spec.job) and spec.dtype != "half"


class Adapter:
    absent, half = True, "bfloat16"
    refusal = tf.errors.InvalidArgumentError

    def __init__(self, name: str, door: str, start: type[TensorFlowRun], plain: type[TensorFlowRun] = Plain):
        self.name, self.door, self.start, self.plain = f"tensorflow-{name}", door, start, plain
        self.kernel = tf.Variable(tf.ones([2, 1]))
        self.optimizer = tf.keras.optimizers.SGD(1.0)

    def mistakes(self) -> dict[str, Callable[[], Any]]:
        x, y = tf.ones([8, 2]), tf.ones([7, 1])
        acc = bb.Accumulator(self.optimizer, every=1)

        def split(batch: Any, micro_batch: Any = 2) -> Any:
            return bb.value_and_grad(
                lambda b: tf.reduce_mean(b["x"] @ self.kernel), batch, [self.kernel], micro_batch=micro_batch
            )

        def stream(items: Any) -> Any:
            return acc.apply_gradients([(tf.ones([2, 1]), self.kernel)], items=items)

        def window(every: Any) -> Any:
            return bb.Accumulator(self.optimizer, every=every)

        if self.door == "split":
            return at_the_split_door(split, x, y)
        return at_the_stream_door(stream, window)

    def untouched(self) -> Params:
        return {"kernel": self.kernel.numpy().copy()}


ADAPTERS = [Adapter("split", "split", Split), Adapter("stream", "stream", Stream)]
try:
    import bigbatch.fused  # noqa: F401

    ADAPTERS.append(Adapter("split-products", "split", SplitProducts, PlainWide))
    ADAPTERS.append(Adapter("stream-products", "stream", StreamProducts, PlainWide))
except ModuleNotFoundError:  # --hide-fused
    pass
