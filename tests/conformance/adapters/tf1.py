"""TensorFlow 1's door, driven as a user of graphs and sessions would. TensorFlow 2 behavior stays on.

Also on matrices so large that their gradients wait as products.
"""

import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow as tf

import bigbatch.tf1 as bb
from bigbatch.demo import tf1 as demo
from conformance import jobs
from conformance.jobs import MicroBatch, Params, Spec
from conformance.mistakes import at_the_stream_door
from conformance.wide import WIDTH, is_wide, narrowed, widened

v1 = tf.compat.v1
DTYPES = {"float64": tf.float64, "float32": tf.float32, "half": tf.bfloat16}
EXTRAS = {"net": ("y",), "missing": ("ids", "has")}


class AdamW(demo.AdamW):
    """The demo's, for rows too: it decays the whole table where any row has a gradient."""

    def _resource_apply_sparse(self, grad: Any, var: Any, indices: Any) -> Any:
        with tf.control_dependencies([self.decay(grad, var)]):
            return super()._resource_apply_sparse(grad, var, indices)


class Overwriting(v1.train.GradientDescentOptimizer):
    """Takes the gradients' memory for its own use, as an op that works in place may."""

    def _resource_apply_dense(self, grad: Any, var: Any) -> Any:
        with tf.control_dependencies([super()._resource_apply_dense(grad, var)]):
            rows = tf.range(tf.shape(grad)[0])
            return tf.raw_ops.InplaceUpdate(x=grad, i=rows, v=tf.fill(tf.shape(grad), tf.constant(np.nan, grad.dtype)))


class Averaged(v1.train.Optimizer):
    """Keeps an exponential moving average of the variables, as contrib's MovingAverageOptimizer did."""

    def __init__(self, optimizer: v1.train.Optimizer, decay: float, variables: Sequence[Any]):
        super().__init__(use_locking=False, name="Averaged")
        self.optimizer, self.of = optimizer, list(variables)
        self.average = tf.train.ExponentialMovingAverage(decay)

    def compute_gradients(self, *args: Any, **kwargs: Any) -> Any:
        return self.optimizer.compute_gradients(*args, **kwargs)

    def apply_gradients(self, grads_and_vars: Any, global_step: Any = None, name: str | None = None) -> Any:
        with tf.control_dependencies([self.optimizer.apply_gradients(grads_and_vars, global_step, name)]):
            return self.average.apply(self.of)

    def variables(self) -> list[Any]:
        return [*self.optimizer.variables(), *(self.average.average(v) for v in self.of)]


class TF1Run:
    """A session, and a graph that is built once for all sessions of a spec."""

    wide = False
    graphs: ClassVar[dict[Any, dict[str, Any]]] = {}

    def __init__(self, spec: Spec):
        key = type(self), pickle.dumps(spec)
        if key not in self.graphs:
            self.build(spec)
            self.graphs[key] = dict(vars(self))
        vars(self).update(self.graphs[key])
        self.seen: set[Any] = set()
        self.compiled = self.waits = 0
        self.session = v1.Session(graph=self.graph)
        self.session.run(self.initializer)

    def build(self, spec: Spec) -> None:
        self.spec, self.dtype = spec, DTYPES[spec.dtype]
        self.graph = tf.Graph()
        with self.graph.as_default():
            v1.set_random_seed(spec.seed)
            self.step = v1.train.get_or_create_global_step()
            self.wide = self.wide and is_wide(spec.job)
            self.vars = {name: self.variable(name, value) for name, value in spec.params.items()}
            self.feeds = {name: self.placeholder(name) for name in ("x", "weight", *EXTRAS.get(spec.job, ()))}
            self.items = tf.reduce_sum(tf.cast(self.feeds["weight"], tf.float64))
            self.loss = self.mean_loss(self.feeds)
            self.optimizer = self.make_optimizer()
            self.op = self.train_op()
            self.saver = v1.train.Saver()
            self.initializer = v1.global_variables_initializer()

    def variable(self, name: str, value: np.ndarray) -> Any:
        shrink = self.spec.shrink
        constraint = None if shrink is None else lambda v: v * shrink
        initial = tf.constant(widened(name, value) if self.wide else value, self.dtype)
        return v1.get_variable(name, initializer=initial, constraint=constraint)

    def placeholder(self, name: str) -> tf.Tensor:
        d = self.spec.params["w"].shape[0] if "w" in self.spec.params else jobs.D
        return v1.placeholder(tf.int64 if name == "ids" else self.dtype, [None, d] if name == "x" else [None], name)

    def mean_loss(self, m: dict[str, tf.Tensor]) -> tf.Tensor:
        x, v, job = m["x"], self.vars, self.spec.job
        if self.wide:
            losses = self.wide_losses(m)
        elif job == "net":
            h = tf.tanh(x @ v["a"] + v["b"])
            losses = (tf.linalg.matvec(h, v["c"]) - m["y"]) ** 2 / 2
        elif job == "missing":
            w = v["w"] + tf.gather(v["table"], m["ids"]) + m["has"][:, None] * v["extra"]
            losses = tf.reduce_sum(w * x, 1)
        else:
            losses = tf.linalg.matvec(v1.nn.dropout(x, rate=0.5) if job == "dropout" else x, v["w"])
        return tf.reduce_sum(losses * m["weight"]) / tf.reduce_sum(m["weight"])

    def wide_losses(self, m: dict[str, tf.Tensor]) -> tf.Tensor:
        v, job = self.vars, self.spec.job
        x = v1.nn.dropout(m["x"], rate=0.5) if job == "dropout" else m["x"]
        x = tf.pad(x, [[0, 0], [0, WIDTH - x.shape[1]]])
        if job == "net":
            return ((tf.tanh(x @ v["a"] + v["b"]) @ v["c"])[:, 0] - m["y"]) ** 2 / 2
        return (x @ v["w"])[:, 0]

    def narrow(self, values: Params) -> Params:
        """In the shapes that the law gave."""
        return narrowed(values, self.spec.params) if self.wide else values

    def make_optimizer(self) -> v1.train.Optimizer:
        spec, rates = self.spec, self.spec.rates
        rate: Any = np.float64(rates[0])  # v1's optimizers would make a float32 of a Python float
        if len(rates) > 1:
            # Boundaries are included on their left.
            rate = v1.train.piecewise_constant(self.step, [np.int64(k) for k in range(len(rates) - 1)], list(rates))
        made = {
            "sgd": lambda: v1.train.GradientDescentOptimizer(rate),
            "momentum": lambda: v1.train.MomentumOptimizer(rate, 0.9),
            "adamw": lambda: AdamW(rate, spec.decay),
            "overwriting": lambda: Overwriting(rate),
        }[spec.optimizer]()
        return made if spec.ema is None else Averaged(made, spec.ema, list(self.vars.values()))

    def train_op(self) -> tf.Operation:
        raise NotImplementedError

    def run(self, fetches: Any, micro_batch: MicroBatch | None = None) -> Any:
        """`session.run`, and what it costs: a new signature is compiled, and a value has to be waited for."""
        feed = {self.feeds[name]: a for name, a in (micro_batch or {}).items()}
        signature = (str(fetches), tuple(sorted(t.name for t in feed)))
        self.compiled += signature not in self.seen
        self.seen.add(signature)
        self.waits += any(not isinstance(fetch, tf.Operation) for fetch in tf.nest.flatten(fetches))
        return self.session.run(fetches, feed)

    def params(self) -> Params:
        return self.narrow({name: np.asarray(v, np.float64) for name, v in self.session.run(self.vars).items()})

    def held(self) -> list[np.ndarray]:
        return [np.asarray(v, np.float64) for v in self.session.run([self.step, *self.optimizer.variables()])]

    def updates(self) -> int:
        return int(self.session.run(self.step))

    def ema(self) -> Params:
        averages = {name: self.optimizer.average.average(v) for name, v in self.vars.items()}
        return self.narrow(self.session.run(averages))

    def save(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as directory, self.graph.as_default():
            self.saver.save(self.session, str(Path(directory, "model")), write_meta_graph=False)
            return {path.name: path.read_bytes() for path in Path(directory).iterdir()}

    def load(self, saved: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as directory, self.graph.as_default():
            for name, content in saved.items():
                Path(directory, name).write_bytes(content)
            self.saver.restore(self.session, str(Path(directory, "model")))

    def watch(self, work: Callable[[], Any]) -> tuple[int, int]:
        before = self.compiled + self.graph.version, self.waits
        work()
        return self.compiled + self.graph.version - before[0], self.waits - before[1]


class Plain(TF1Run):
    def train_op(self) -> tf.Operation:
        pairs = self.optimizer.compute_gradients(self.loss)
        if self.spec.clip_norm is not None:
            gradients, variables = zip(*pairs, strict=True)
            gradients, _ = tf.clip_by_global_norm(gradients, self.spec.clip_norm)
            pairs = list(zip(gradients, variables, strict=True))
        return self.optimizer.apply_gradients(pairs, self.step)

    def window(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.run(self.op, jobs.join(micro_batches))


class Stream(TF1Run):
    """The session knows when a window is full; the host counts along, so that it need not ask."""

    fed = 0
    others: ClassVar[dict[Any, Any]] = {}

    def train_op(self) -> tf.Operation:
        spec = self.spec
        self.acc = bb.Accumulator(self.optimizer, spec.every, clip_norm=spec.clip_norm, partial=spec.partial)
        return self.acc.minimize(self.loss, self.step, items=self.items)

    def feed(self, micro_batch: MicroBatch) -> bb.Update | None:
        self.run(self.op, micro_batch)
        self.fed += 1
        if self.fed < self.spec.every:
            return None
        self.fed = 0
        return self.run(self.acc.last)

    def window(self, micro_batches: Sequence[MicroBatch]) -> bb.Update | None:
        return [self.feed(m) for m in micro_batches][-1]

    def flush(self) -> bb.Update | None:
        if not self.pending:
            return None
        self.run(self.acc.flush)
        self.fed = self.pending
        return self.run(self.acc.last)

    def reset(self) -> None:
        self.run(self.acc.zero)
        self.fed = 0

    @property
    def pending(self) -> int:
        return int(self.run(self.acc.pending))

    def load(self, saved: Any) -> None:
        super().load(saved)
        self.fed = self.pending

    def acts(self) -> dict[str, Callable[[], None]]:
        if self.graph not in self.others:
            self.others[self.graph] = self.built_acts()
        initializer, ops = self.others[self.graph]
        self.session.run(initializer)
        micro_batch = jobs.window(self.spec.job, (3,), seed=99)[0]
        return {name: lambda op=op: self.run(op, micro_batch) for name, op in ops.items()}

    def built_acts(self) -> tuple[Any, dict[str, Any]]:
        """What others may run, in this run's own graph, and what initializes their variables."""
        with self.graph.as_default():
            second = bb.Accumulator(v1.train.GradientDescentOptimizer(0.1), every=1)
            pairs = [(v / 4, v) for v in self.vars.values()]  # zeros, as of `wide`, stay zeros
            ops = {
                "minimize": self.optimizer.minimize(self.loss, self.step),
                "apply_gradients": self.optimizer.apply_gradients(pairs),
                "assign": [v.assign(v / 2) for v in self.vars.values()],
                "Accumulator": second.minimize(self.loss, items=self.items),
            }
            return v1.variables_initializer(second.variables()), ops

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> bb.Update | None:
        report = None
        for number, micro_batch in enumerate(micro_batches):
            if number == place:
                act()
            try:
                report = self.feed(micro_batch)
            except tf.errors.InvalidArgumentError:
                self.fed = 0
                raise
        return report


class PlainWide(Plain):
    wide = True


class StreamProducts(Stream):
    """Fails where no product is deferred, as it would otherwise pass without testing any."""

    wide = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        deferred = any(type(s).__name__ == "DeferredSum" for s, _ in self.acc._sums)
        assert deferred or not self.wide or self.dtype not in (tf.float32, tf.float64)


class Adapter:
    door, absent, half = "stream", True, "bfloat16"
    refusal = tf.errors.InvalidArgumentError  # items are a tensor in the graph

    def __init__(self, name: str, start: type[TF1Run], plain: type[TF1Run]):
        self.name, self.start, self.plain = f"tf1-{name}", start, plain
        self.graph = tf.Graph()
        with self.graph.as_default():
            x = tf.ones([8, 2])
            self.w = v1.get_variable("w", [2])
            self.loss = tf.reduce_mean(tf.linalg.matvec(x, self.w))
            self.optimizer = v1.train.GradientDescentOptimizer(1.0)
            self.session = v1.Session()
            self.session.run(v1.global_variables_initializer())

    def mistakes(self) -> dict[str, Callable[[], Any]]:
        acc = bb.Accumulator(self.optimizer, every=1)

        def stream(items: Any) -> Any:
            with self.graph.as_default():
                return acc.minimize(self.loss, items=items)

        def window(every: Any) -> Any:
            return bb.Accumulator(self.optimizer, every=every)

        return at_the_stream_door(stream, window)

    def untouched(self) -> Params:
        return {"w": self.session.run(self.w), "operations": np.array(len(self.graph.get_operations()))}


ADAPTERS = [Adapter("stream", Stream, Plain)]
try:
    import bigbatch.fused  # noqa: F401

    ADAPTERS.append(Adapter("stream-products", StreamProducts, PlainWide))
except ModuleNotFoundError:  # --hide-fused
    pass
