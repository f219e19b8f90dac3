"""JAX's two APIs, driven as a user of optax would."""

import contextlib
import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import bigbatch.jax as bb
from conformance import jobs
from conformance.jobs import MicroBatch, Params, Spec
from conformance.mistakes import at_the_split_door, at_the_stream_door

try:
    from bigbatch.fused import jax_deferred
except ModuleNotFoundError:  # --hide-fused
    jax_deferred = None

jax.config.update("jax_enable_x64", True)

DTYPES = {"float64": jnp.float64, "float32": jnp.float32, "half": jnp.bfloat16}


def loss_fn(job: str, params: Any, m: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The four jobs: the mean loss, and the items it is the mean of."""
    x, weight = m["x"], m["weight"]
    if job == "net":
        losses = (jnp.tanh(x @ params["a"] + params["b"]) @ params["c"] - m["y"]) ** 2 / 2
    elif job == "missing":
        w = params["w"] + params["table"][m["ids"]] + m["has"][:, None] * params["extra"]
        losses = (w * x).sum(1)
    else:
        if job == "dropout":
            x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0)
        losses = x @ params["w"]
    return losses @ (weight / weight.sum()), weight.sum()


@functools.cache
def optimizer(spec: Spec) -> optax.GradientTransformationExtraArgs:
    """Clipping, the update on its schedule, and a constraint. JAX's arrays cannot be overwritten, only donated."""
    rates = jnp.asarray(spec.rates)

    def schedule(count: jax.Array) -> jax.Array:
        return rates[jnp.minimum(count, len(spec.rates) - 1)]

    kinds = {
        "adamw": functools.partial(optax.adamw, weight_decay=spec.decay),
        "momentum": functools.partial(optax.sgd, momentum=0.9),
    }
    parts = [kinds.get(spec.optimizer, optax.sgd)(schedule)]
    if spec.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(spec.clip_norm))
    if spec.shrink is not None:
        parts.append(optax.stateless_with_tree_map(lambda u, p: (p + u) * spec.shrink - p))
    return optax.chain(*parts)


@functools.cache
def accumulated(spec: Spec) -> optax.GradientTransformationExtraArgs:
    return bb.accumulate(optimizer(spec), every=spec.every, partial=spec.partial)


# What is compiled together is rounded together: XLA contracts a·b + c across whatever one program holds. So that
# two trainings can agree to the bit, the gradient, the update and its application are a program each in both, and
# they live here, where runs share what was compiled.
@functools.partial(jax.jit, static_argnums=0)
def whole(job: str, params: Any, m: Any, key: jax.Array) -> Any:
    return jax.value_and_grad(functools.partial(loss_fn, job), has_aux=True)(params, m, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def split(job: str, micro_batch: int, params: Any, batch: Any, key: jax.Array) -> Any:
    loss = functools.partial(loss_fn, job)
    return bb.value_and_grad(loss, has_items=True, micro_batch=micro_batch, in_axes=(None, 0, None))(params, batch, key)


@contextlib.contextmanager
def proven(owner: Any, method: str, job: str, micro_batch: int, params: Any, batch: Any) -> Iterator[None]:
    """The trace must call this method of a gradient's part, wherever the job has a product of several micro-batches."""
    with mock.patch.object(owner, method, autospec=True, side_effect=getattr(owner, method)) as called:
        yield
    narrow = any(p.dtype == DTYPES["half"] for p in params.values())  # the sums are wider than the products
    if job != "missing" and len(batch["x"]) >= 2 * micro_batch and not narrow:
        assert called.called, f"{job}: no gradient was summed by {owner.__name__}.{method}"


@functools.partial(jax.jit, static_argnums=(0, 1))
def split_with_products(*args: Any) -> Any:
    """Where every product is deferred to the end, however large its factors are."""
    always = {"SMALL": 0, "SMALLER": 0, "SHARE": math.inf, "FEWEST": 2}
    with mock.patch.multiple(jax_deferred, **always), proven(jax_deferred.FactoredGrad, "product", *args[:4]):
        return split.__wrapped__(*args)


@functools.partial(jax.jit, static_argnums=(0, 1))
def split_with_cut_products(*args: Any) -> Any:
    """Where every product is added to the sum in pieces, once for all micro-batches of full size."""
    always = {"SMALL": 0, "SMALLER": math.inf, "LARGE": 0, "PIECES": 1, "FEWEST": 2, "_group": lambda *args: args[-1]}
    with mock.patch.multiple(jax_deferred, **always), proven(jax_deferred.PiecewiseGrad, "added_to", *args[:4]):
        return split.__wrapped__(*args)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def update(tx: Any, grads: Any, opt: Any, params: Any, **extra: Any) -> Any:
    return tx.update(grads, opt, params, **extra)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def flush(tx: Any, opt: Any, params: Any) -> Any:
    return bb.flush(tx, opt, params)


apply_updates = jax.jit(optax.apply_updates, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def moving_average(decay: float, average: Any, params: Any, updated: Any) -> Any:
    moved = optax.incremental_update(params, average, 1 - decay)
    return jax.tree.map(functools.partial(jnp.where, updated), moved, average)


class Counts:
    """Counts traces and compilations, and the times that the host reads a value from the device."""

    COMPILED = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration")
    # NumPy reads an array's buffer, `item` too; every other way to the host goes through `_value`.
    WAYS = ((np, "asarray"), (np, "array"), (jax, "device_get"), (jax, "block_until_ready"),
            *((type(jnp.zeros(())), name) for name in ("_value", "item", "block_until_ready")))  # fmt: skip

    def __enter__(self) -> "Counts":
        self.compiled = self.waits = 0
        self.patched = contextlib.ExitStack()
        for owner, name in self.WAYS:
            way = getattr(owner, name)
            counted = property(self.counted(way.fget)) if isinstance(way, property) else self.counted(way)
            self.patched.enter_context(mock.patch.object(owner, name, counted))
        jax.monitoring.register_event_duration_secs_listener(self.heard)
        return self

    def __exit__(self, *_: Any) -> None:
        # JAX 0.7 cannot unregister; there the listener stays, and nobody reads its count.
        getattr(jax.monitoring, "unregister_event_duration_listener", lambda _: None)(self.heard)
        self.patched.close()

    def heard(self, event: str, duration: float, **_: Any) -> None:
        self.compiled += event in self.COMPILED

    def counted(self, way: Callable[..., Any]) -> Callable[..., Any]:
        def count(x: Any, *args: Any, **kwargs: Any) -> Any:
            self.waits += any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
            return way(x, *args, **kwargs)

        return count


class JaxRun:
    transformation = staticmethod(optimizer)

    def __init__(self, spec: Spec):
        self.spec = spec
        self.tx = self.transformation(replace(spec, params=(), seed=0))  # hashable
        params = {name: jnp.asarray(p, DTYPES[spec.dtype]) for name, p in spec.params.items()}
        self.state = {"params": params, "opt": self.tx.init(params), "average": jax.tree.map(jnp.copy, params)}
        self.key = jax.random.key(spec.seed)

    def apply(self, updates: Any, updated: Any = True) -> None:
        self.state["params"] = apply_updates(self.state["params"], updates)
        if self.spec.ema is not None:
            args = self.spec.ema, self.state["average"], self.state["params"], updated
            self.state["average"] = moving_average(*args)

    def arrays(self, m: MicroBatch) -> dict[str, np.ndarray]:
        return {name: a if name == "ids" else a.astype(DTYPES[self.spec.dtype]) for name, a in m.items()}

    def next_key(self) -> jax.Array:
        self.key, key = jax.random.split(self.key)
        return key

    def params(self) -> Params:
        return {name: np.asarray(p, np.float64) for name, p in self.state["params"].items()}

    def inner(self) -> Any:
        return self.state["opt"]

    def held(self) -> list[np.ndarray]:
        return [np.array(leaf) for leaf in jax.tree.leaves((self.inner(), self.state["average"]))]

    def updates(self) -> int:
        counts = {int(count) for _, count in optax.tree.get_all_with_path(self.inner(), "count")}
        assert len(counts) == 1
        return counts.pop()

    def ema(self) -> Params:
        return {name: np.asarray(average, np.float64) for name, average in self.state["average"].items()}

    def save(self) -> Any:
        path = Path(tempfile.mkdtemp()) / "step"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, {**self.state, "key": self.key})
        return path

    def load(self, saved: Any) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {**self.state, "key": self.key})
            self.state = checkpointer.restore(saved, target)
        shutil.rmtree(saved.parent)
        self.key = self.state.pop("key")

    def watch(self, work: Callable[[], Any]) -> tuple[int, int]:
        with Counts() as counts:
            work()
        return counts.compiled, counts.waits


class Plain(JaxRun):
    def window(self, micro_batches: Sequence[MicroBatch]) -> None:
        batch = self.arrays(jobs.join(micro_batches))
        _, grads = whole(self.spec.job, self.state["params"], batch, self.next_key())
        updates, self.state["opt"] = update(self.tx, grads, self.state["opt"], self.state["params"])
        self.apply(updates)


class Split(JaxRun):
    call = staticmethod(split)

    def join(self, micro_batches: Sequence[MicroBatch]) -> tuple[dict[str, np.ndarray], int]:
        """The batch. Its examples are dealt out in turn, so these are put where each comes back to its own."""
        size = len(micro_batches[0]["x"])
        full = [m for m in micro_batches if len(m["x"]) == size]
        dealt = {name: np.stack([m[name] for m in full], 1).reshape(-1, *a.shape[1:]) for name, a in full[0].items()}
        return self.arrays(jobs.join([dealt, *micro_batches[len(full) :]])), size

    def door(self, micro_batches: Sequence[MicroBatch]) -> Any:
        batch, size = self.join(micro_batches)
        return self.call(self.spec.job, size, self.state["params"], batch, self.next_key())

    def gradient(self, micro_batches: Sequence[MicroBatch]) -> dict[str, np.ndarray | None]:
        return self.door(micro_batches)[1]

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace:
        loss, grads = self.door(micro_batches)
        skipped = None if math.isfinite(loss) else "not finite"
        if skipped is None:
            updates, self.state["opt"] = update(self.tx, grads, self.state["opt"], self.state["params"])
            self.apply(updates)
        items = jobs.items(jobs.join(micro_batches))
        return SimpleNamespace(micro_batches=len(micro_batches), items=items, loss=float(loss), skipped=skipped)

    def acts(self) -> dict[str, Callable[[], None]]:
        """Nothing outside reaches a pure function's arguments: all of these go unnoticed, and change nothing."""

        def assignment() -> None:
            self.state["params"] = jax.tree.map(lambda p: 1.5 * p, self.state["params"])

        def gradient() -> None:
            self.gradient(jobs.window("net", (3, 3, 3, 1), seed=99))

        return {"assignment": assignment, "gradient": gradient}

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> None:
        if place == 0:
            act()
        params = self.state["params"]
        batch, size = self.join(micro_batches)
        calls = 0

        def loss(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == min(place, 2) + 1 and place:  # traced three times: for its shapes, the loop, and what remains
                with jax.ensure_compile_time_eval():  # what the act computes is no part of the traced function
                    act()
            return loss_fn(self.spec.job, *args)

        found = bb.value_and_grad(loss, has_items=True, micro_batch=size, in_axes=(None, 0, None))
        _, grads = found(params, batch, self.next_key())
        updates, self.state["opt"] = update(self.tx, grads, self.state["opt"], params)
        self.state["params"] = apply_updates(params, updates)


class SplitWithProducts(Split):
    call = staticmethod(split_with_products)


class SplitWithCutProducts(Split):
    call = staticmethod(split_with_cut_products)


class Stream(JaxRun):
    transformation = staticmethod(accumulated)
    pending = 0

    def feed(self, micro_batch: MicroBatch) -> SimpleNamespace | None:
        m, params = self.arrays(micro_batch), self.state["params"]
        (loss, items), grads = whole(self.spec.job, params, m, self.next_key())
        updates, self.state["opt"] = update(self.tx, grads, self.state["opt"], params, items=items, value=loss)
        self.apply(updates, bb.has_updated(self.state["opt"]))
        self.pending = (self.pending + 1) % self.spec.every  # counted here too, so as not to wait for the device
        return self.report() if self.pending == 0 else None

    def report(self) -> SimpleNamespace:
        last = self.state["opt"].last
        self.pending = int(self.state["opt"].micro_batches)
        return SimpleNamespace(
            micro_batches=int(last.micro_batches), items=float(last.items), loss=float(last.loss), skipped=last.reason
        )

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace | None:
        return [self.feed(m) for m in micro_batches][-1]

    def flush(self) -> SimpleNamespace | None:
        updates, self.state["opt"] = flush(self.tx, self.state["opt"], self.state["params"])
        self.apply(updates, bb.has_updated(self.state["opt"]))
        report = self.report()
        return report if report.micro_batches else None

    def acts(self) -> dict[str, Callable[[], None]]:
        """Others may move the parameters. Of the state they can only make another, for nothing in it is overwritten."""

        def assignment() -> None:
            self.state["params"] = {name: p * (1 + 1e-12) for name, p in self.state["params"].items()}

        def params() -> None:
            self.state["params"] = jax.tree.map(lambda p: p.at[0].set(-p[0]), self.state["params"])

        def step() -> None:
            bare = optimizer(replace(self.spec, params=(), seed=0))
            updates, _ = bare.update(self.state["params"], bare.init(self.state["params"]), self.state["params"])
            self.state["params"] = optax.apply_updates(self.state["params"], updates)

        def fork() -> None:
            grads = jax.tree.map(jnp.ones_like, self.state["params"])
            opt = jax.tree.map(jnp.copy, self.state["opt"])
            _, opt = update(self.tx, grads, opt, self.state["params"], items=3.0, value=1.0)
            bb.reset(opt)
            flush(self.tx, opt, self.state["params"])

        return {"assignment": assignment, "params": params, "update": step, "fork": fork}

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> Any:
        report = None
        for i, m in enumerate(micro_batches):
            if i == place:
                act()
            report = self.feed(m)
        return report

    def reset(self) -> None:
        self.state["opt"] = bb.reset(self.state["opt"])
        self.pending = 0

    def load(self, saved: Any) -> None:
        super().load(saved)
        self.pending = int(self.state["opt"].micro_batches)

    def inner(self) -> Any:
        return self.state["opt"].inner


class Adapter:
    absent, half = False, "bfloat16"
    refusal = None  # `feed` passes items into a compiled step
    plain = Plain

    def __init__(self, name: str, door: str, start: type[JaxRun]):
        self.name, self.door, self.start = f"jax-{name}", door, start
        self.params = {"w": jnp.ones(2)}

    def mistakes(self) -> dict[str, Callable[[], Any]]:
        x, y = jnp.ones((8, 2)), jnp.ones((7, 1))
        tx = bb.accumulate(optax.sgd(1.0), every=1)
        state = tx.init(self.params)

        def split(batch: Any, micro_batch: Any = 2) -> Any:
            def loss_fn(params: Any, batch: Any) -> jax.Array:
                return (batch["x"] @ params["w"]).mean()

            return bb.value_and_grad(loss_fn, micro_batch=micro_batch)(self.params, batch)

        def stream(items: Any) -> Any:
            updates, _ = tx.update(self.params, state, self.params, items=items)
            self.params = optax.apply_updates(self.params, updates)

        def window(every: Any) -> Any:
            return bb.accumulate(optax.sgd(1.0), every=every)

        if self.door == "split":
            return at_the_split_door(split, x, y)
        return at_the_stream_door(stream, window)

    def untouched(self) -> Params:
        return {name: np.asarray(p) for name, p in self.params.items()}


ADAPTERS = [Adapter("split", "split", Split), Adapter("stream", "stream", Stream)]
if jax_deferred is not None:
    ADAPTERS += [
        Adapter("split-products", "split", SplitWithProducts),
        Adapter("split-cut-products", "split", SplitWithCutProducts),
    ]
