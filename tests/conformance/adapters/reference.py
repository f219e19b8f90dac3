"""The laws' own reference in NumPy: a stream door that is right, slow, and easy to make wrong on purpose.

Every step that a wrong adapter gets wrong is a method of its own here.
"""

import pickle
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from bigbatch import errors, law
from conformance import jobs
from conformance.jobs import MicroBatch, Params, Spec
from conformance.mistakes import at_the_stream_door

DTYPES = {"float64": np.float64, "float32": np.float32, "half": np.float16}
Gradient = dict[str, np.ndarray | None]


class ReferenceRun:
    def __init__(self, spec: Spec):
        self.spec = spec
        self.dtype = DTYPES[spec.dtype]
        self.p = {name: p.astype(self.dtype) for name, p in spec.params.items()}
        self.state: dict[str, Any] = {"step": 0, "rng": np.random.default_rng(spec.seed), "ema": dict(self.p)}
        for slot in ("m", "v"):
            self.state[slot] = {name: np.zeros_like(p) for name, p in self.p.items()}
        self.compiled = self.waits = 0
        self.reset()

    def reset(self) -> None:
        self.opened = self.state["step"]
        self.gradients: list[Gradient] = []
        self.items: list[float] = []
        self.losses: list[float] = []

    @property
    def pending(self) -> int:
        return len(self.items)

    def feed(self, micro_batch: MicroBatch) -> SimpleNamespace | None:
        self.refuse_others()
        loss, gradient = self.loss_and_gradient(micro_batch)
        self.gradients.append(gradient)
        self.items.append(errors.check_items(jobs.items(micro_batch)))
        self.losses.append(loss)
        return self.close() if self.pending == self.spec.every else None

    def window(self, micro_batches: Sequence[MicroBatch]) -> Any:
        return [self.feed(m) for m in micro_batches][-1]

    def acts(self) -> dict[str, Callable[[], None]]:
        other = {name: np.ones_like(p) for name, p in self.p.items()}
        return {
            "zero_grad": self.gradients.clear,
            "backward": lambda: self.gradients.append(other),
            "step": lambda: self.apply(other),
        }

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> Any:
        reports = []
        for i, micro_batch in enumerate(micro_batches):
            if i == place:
                act()
            reports.append(self.feed(micro_batch))
        return reports[-1]

    def refuse_others(self) -> None:
        """A window owns its gradients from its first micro-batch on; what lies there before, it discards."""
        if not self.pending:
            self.reset()
            self.opened = self.state["step"]
        seen = {
            "zero_grad": len(self.gradients) < self.pending,
            "backward": len(self.gradients) > self.pending,
            "step": self.state["step"] != self.opened,
        }
        for name, happened in seen.items():
            if happened:
                self.reset()
                raise RuntimeError(f"Somebody else called {name} inside an open window.")

    def flush(self) -> SimpleNamespace | None:
        if not self.pending:
            return None
        if self.spec.partial == "apply":
            return self.close()
        if self.spec.partial == "carry":
            return self.report("carried")
        report = self.report("dropped")
        self.reset()
        return report

    def loss_and_gradient(self, m: MicroBatch) -> tuple[float, Gradient]:
        m = {name: a if name == "ids" else a.astype(self.dtype) for name, a in m.items()}
        if self.spec.job == "dropout":
            keep = self.state["rng"].random(m["x"].shape) < 0.5
            return jobs.loss_and_gradient("mean", self.p, {**m, "x": m["x"] * keep * 2})
        with np.errstate(invalid="ignore"):  # NaN is what some laws feed
            return jobs.loss_and_gradient(self.spec.job, self.p, m)

    def mean(self) -> Gradient:
        """The law, with absent gradients as zeros; in float64, where n·g / n is g again, then in float32 at least."""
        wide = np.promote_types(self.dtype, np.float32)
        means: Gradient = {}
        for name in self.p:
            present = [g[name] for g in self.gradients if g[name] is not None]
            filled = [np.zeros_like(self.p[name]) if g[name] is None else g[name] for g in self.gradients]
            exact = law.mean([g.astype(np.float64) for g in filled], self.items)
            means[name] = exact.astype(wide) if present else None
        return means

    def loss(self) -> float:
        return law.mean(self.losses, self.items)

    def clip(self, gradient: Gradient) -> Gradient:
        if self.spec.clip_norm is None:
            return gradient
        norm = np.sqrt(sum((g**2).sum() for g in gradient.values() if g is not None))
        factor = min(1.0, self.spec.clip_norm / (norm + 1e-6))
        return {name: None if g is None else g * factor for name, g in gradient.items()}

    def report(self, skipped: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(micro_batches=self.pending, items=sum(self.items), loss=self.loss(), skipped=skipped)

    def close(self) -> SimpleNamespace:
        gradient = self.clip(self.mean())
        report = self.report()
        if all(g is None or np.isfinite(g).all() for g in gradient.values()) and np.isfinite(report.loss):
            self.apply(gradient)
        else:
            report.skipped = "not finite"
        self.reset()
        return report

    def rate(self) -> float:
        return self.spec.rates[min(self.state["step"], len(self.spec.rates) - 1)]

    def apply(self, gradient: Gradient) -> None:
        """One update, and all that belongs to it."""
        rate, s = self.rate(), self.state
        s["step"] += 1
        for name, g in gradient.items():
            if g is not None:
                self.p[name] = self.step(name, g.astype(self.dtype), rate).astype(self.dtype)
                if self.spec.optimizer == "overwriting":
                    g[...] = np.nan
        for name, p in self.p.items():
            if self.spec.shrink is not None:
                self.p[name] = p * self.spec.shrink
            if self.spec.ema is not None:
                s["ema"][name] = self.spec.ema * s["ema"][name] + (1 - self.spec.ema) * self.p[name]

    def step(self, name: str, g: np.ndarray, rate: float) -> np.ndarray:
        p, s, t = self.p[name], self.state, self.state["step"]
        if self.spec.optimizer in ("sgd", "overwriting"):
            return p - rate * g
        if self.spec.optimizer == "momentum":
            s["m"][name] = 0.9 * s["m"][name] + g
            return p - rate * s["m"][name]
        p = p * (1 - rate * self.spec.decay)
        s["m"][name] = 0.9 * s["m"][name] + 0.1 * g
        s["v"][name] = 0.999 * s["v"][name] + 0.001 * g**2
        m, v = s["m"][name] / (1 - 0.9**t), s["v"][name] / (1 - 0.999**t)
        return p - rate * m / (np.sqrt(v) + 1e-8)

    def params(self) -> Params:
        return {name: p.astype(np.float64) for name, p in self.p.items()}

    def held(self) -> list[np.ndarray]:
        slots = [dict(self.state[slot]) for slot in ("m", "v", "ema")]
        return [np.asarray(self.state["step"]), *[a for slot in slots for a in slot.values()]]

    def updates(self) -> int:
        return self.state["step"]

    def ema(self) -> Params:
        return dict(self.state["ema"])

    def save(self) -> bytes:
        return pickle.dumps((self.p, self.state, self.gradients, self.items, self.losses))

    def load(self, saved: bytes) -> None:
        self.p, self.state, self.gradients, self.items, self.losses = pickle.loads(saved)
        self.opened = self.state["step"]

    def watch(self, work: Callable[[], Any]) -> tuple[int, int]:
        before = self.compiled, self.waits
        work()
        return self.compiled - before[0], self.waits - before[1]


class PlainRun(ReferenceRun):
    """The big batch in one piece."""

    def window(self, micro_batches: Sequence[MicroBatch]) -> Any:
        self.apply(self.clip(self.loss_and_gradient(jobs.join(micro_batches))[1]))


class Reference:
    door, absent, half, refusal = "stream", True, "float16", ValueError

    def __init__(self, name: str = "reference", run: Callable[[Spec], ReferenceRun] = ReferenceRun):
        self.name, self.start = name, run

    plain = PlainRun

    def mistakes(self) -> dict[str, Callable[[], Any]]:
        return at_the_stream_door(errors.check_items, errors.check_every)

    def untouched(self) -> Params:
        return {}
