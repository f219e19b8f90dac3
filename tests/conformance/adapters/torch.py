"""PyTorch's two APIs, driven as its users would: with every gradient autograd's, and with those of weights fused."""

import io
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch.torch as bb
from conformance import jobs, torch_products
from conformance.jobs import MicroBatch, Params, Spec
from conformance.mistakes import at_the_split_door, at_the_stream_door
from conformance.torch_products import must_fuse, small_ones_too

DTYPES = {"float64": torch.float64, "float32": torch.float32, "half": torch.bfloat16}


class Model(torch.nn.Module):
    """The four jobs. `sparse` makes the embedding's gradient a sparse tensor."""

    def __init__(self, spec: Spec):
        super().__init__()
        for name, value in spec.params.items():
            self.register_parameter(name, torch.nn.Parameter(torch.as_tensor(value, dtype=DTYPES[spec.dtype]).clone()))
        self.job, self.sparse = spec.job, spec.optimizer != "adamw"

    def named_values(self) -> dict[str, torch.Tensor]:
        """The parameters in the jobs' own shapes."""
        return dict(self.named_parameters())

    def forward(self, m: dict[str, torch.Tensor]) -> torch.Tensor:
        x = m["x"]
        if self.job == "net":
            return (torch.tanh(x @ self.a + self.b) @ self.c - m["y"]) ** 2 / 2
        if self.job == "missing":
            w = self.w + F.embedding(m["ids"], self.table, sparse=self.sparse)
            if m["has"].any():
                w = w + m["has"][:, None] * self.extra
            return (w * x).sum(1)
        if self.job == "dropout":
            x = F.dropout(x, 0.5)
        return x @ self.w

    def loss(self, m: dict[str, torch.Tensor]) -> torch.Tensor:
        return self(m) @ (m["weight"] / m["weight"].sum())


class LinearModel(Model):
    """The same jobs by `F.linear` and a dense `F.embedding`, whose weights lie as `nn.Linear` has them."""

    WEIGHTS = ("a", "c", "w")

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.sparse = False
        for name in self.WEIGHTS:
            if name in spec.params:
                p = getattr(self, name)
                setattr(self, name, torch.nn.Parameter(p.detach().reshape(len(p), -1).T.contiguous()))

    def named_values(self) -> dict[str, torch.Tensor]:
        def back(name: str, p: torch.Tensor) -> torch.Tensor:
            if name not in self.WEIGHTS:
                return p
            return p.T if name == "a" else p[0]

        return {name: back(name, p) for name, p in self.named_parameters()}

    def forward(self, m: dict[str, torch.Tensor]) -> torch.Tensor:
        x = m["x"]
        if self.job == "net":
            return (F.linear(torch.tanh(F.linear(x, self.a, self.b)), self.c)[:, 0] - m["y"]) ** 2 / 2
        if self.job == "missing":
            extra = m["has"] * (self.extra * x).sum(1) if m["has"].any() else 0
            return F.linear(x, self.w)[:, 0] + (F.embedding(m["ids"], self.table) * x).sum(1) + extra
        if self.job == "dropout":
            x = F.dropout(x, 0.5)
        return F.linear(x, self.w)[:, 0]


class Overwriting(torch.optim.SGD):
    """As schedule_free does, it takes the gradients' memory for its own use."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.fill_(float("nan"))


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a value, or a shape that depends on values."""

    READS = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


class TorchRun:
    model_class = Model

    def __init__(self, spec: Spec):
        torch.manual_seed(spec.seed)
        self.spec = spec
        self.model = self.model_class(spec)
        options = {"adamw": {"weight_decay": spec.decay}, "momentum": {"momentum": 0.9}}.get(spec.optimizer, {})
        kind = {"adamw": torch.optim.AdamW, "overwriting": Overwriting}.get(spec.optimizer, torch.optim.SGD)
        self.optimizer = kind(self.model.parameters(), lr=1.0, **options)
        rates = spec.rates
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: rates[min(k, len(rates) - 1)])
        self.average = {name: p.detach().clone() for name, p in self.model.named_values().items()}
        self.optimizer.register_step_post_hook(self.after_step)

    def after_step(self, *_: Any) -> None:
        with torch.no_grad():
            for name, p in self.model.named_values().items():
                if self.spec.shrink is not None:
                    p.mul_(self.spec.shrink)
                if self.spec.ema is not None:
                    self.average[name].lerp_(p, 1 - self.spec.ema)

    def tensors(self, m: MicroBatch) -> dict[str, torch.Tensor]:
        return {
            name: torch.as_tensor(a) if name == "ids" else torch.as_tensor(a, dtype=DTYPES[self.spec.dtype])
            for name, a in m.items()
        }

    def params(self) -> Params:
        return {name: p.double().numpy(force=True).copy() for name, p in self.model.named_values().items()}

    def held(self) -> list[np.ndarray]:
        slots = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        average = [torch.tensor(self.scheduler.last_epoch), *self.average.values()]
        return [t.numpy(force=True).copy() for t in [*slots, *average]]

    def updates(self) -> int:
        steps = {int(state["step"]) for state in self.optimizer.state.values() if "step" in state}
        return steps.pop() if len(steps) == 1 else self.scheduler.last_epoch

    def ema(self) -> Params:
        return {name: average.double().numpy(force=True) for name, average in self.average.items()}

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({"average": self.average, **{k: part.state_dict() for k, part in self.parts().items()}}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.average = state["average"]
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def acts(self) -> dict[str, Callable[[], None]]:
        """Named after the words that a refusal has to say."""
        parameters, optimizer = list(self.model.parameters()), self.optimizer
        probe = self.tensors(jobs.window("net", (3,), seed=13)[0])

        def backward() -> None:
            self.model.loss(probe).backward()

        def accumulator() -> None:
            bb.Accumulator(optimizer, every=2).backward(self.model.loss(probe), items=3)

        def split() -> None:
            bb.backward(lambda m: (self.model.loss(m), m["weight"].sum()), probe, micro_batch=2)

        def write_to_gradient() -> None:
            for p in parameters[:1]:
                if p.grad is not None:
                    p.grad.add_(1)

        def write_to_parameter() -> None:
            with torch.no_grad():
                parameters[0].mul_(0.5)

        return {
            "zero_grad": optimizer.zero_grad,
            "zero_grad(set_to_none=False)": lambda: optimizer.zero_grad(set_to_none=False),
            "step": lambda: optimizer.step(),
            "backward": backward,
            "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1e-3) and None,
            "in-place write": write_to_gradient,
            "load_state_dict": write_to_parameter,
            "Accumulator": accumulator,
            "bb.backward": split,
        }

    def watch(self, work: Callable[[], Any]) -> tuple[int, int]:
        with Waits() as waits:
            work()
        return 0, waits.count


class Plain(TorchRun):
    def window(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.model.loss(self.tensors(jobs.join(micro_batches))).backward()
        if self.spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


class Stream(TorchRun):
    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.acc = bb.Accumulator(
            self.optimizer,
            every=spec.every,
            clip_norm=spec.clip_norm,
            scheduler=self.scheduler,
            partial=spec.partial,
        )

    def feed(self, micro_batch: MicroBatch) -> bb.Update | None:
        return self.acc.backward(self.model.loss(self.tensors(micro_batch)), items=jobs.items(micro_batch))

    def window(self, micro_batches: Sequence[MicroBatch]) -> bb.Update | None:
        return [self.feed(m) for m in micro_batches][-1]

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> bb.Update | None:
        update = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients lay in .grad")
            for k, m in enumerate(micro_batches):
                if k == place:
                    act()
                update = self.feed(m)
        return update

    def flush(self) -> bb.Update | None:
        return self.acc.flush()

    def reset(self) -> None:
        self.acc.reset()

    @property
    def pending(self) -> int:
        return self.acc.pending

    def parts(self) -> dict[str, Any]:
        return {**super().parts(), "acc": self.acc}


class Trainer(Stream):
    """A loop that clips, steps and schedules by itself, and knows which micro-batch is a window's last.

    After every second window it leaves the mean in `.grad`.
    """

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.acc = bb.Gradients(self.model.parameters())

    def feed(self, micro_batch: MicroBatch) -> bb.Update | None:
        loss, last = self.model.loss(self.tensors(micro_batch)), self.acc.pending + 1 == self.spec.every
        return self.applied(self.acc.backward(loss, items=jobs.items(micro_batch), last=last))

    def flush(self) -> Any:
        if self.spec.partial == "apply" or not self.pending:
            return self.applied(self.acc.flush())
        report = SimpleNamespace(micro_batches=self.pending, skipped="carried")
        if self.spec.partial == "drop":
            report.skipped = "dropped"
            self.reset()
        return report

    def applied(self, update: bb.Update | None) -> bb.Update | None:
        if update is None or update.skipped:
            return update
        if not (math.isfinite(update.loss) and math.isfinite(update.grad_norm)):
            return replace(update, skipped="the trainer's own guard")
        if self.spec.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip_norm)
        self.optimizer.step()
        self.scheduler.step()
        if update.index % 2:
            self.optimizer.zero_grad()
        return update


class Split(TorchRun):
    fused = False

    before_loss: Callable[[], None] | None = None  # what somebody else does inside `loss_fn`

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> SimpleNamespace:
        calls = itertools.count()

        def acting() -> None:
            if next(calls) == place:
                act()

        if place == 0:  # before the window: a loop begins with zero_grad()
            act()
            self.optimizer.zero_grad()
        else:
            self.before_loss = acting
        try:
            self.door(micro_batches)
            self.optimizer.step()
        finally:
            self.before_loss = None
            self.optimizer.zero_grad()
        return SimpleNamespace(skipped=None)

    def door(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        def loss_fn(m: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            if self.before_loss is not None:
                self.before_loss()
            return self.model.loss(m), m["weight"].sum()

        batch, micro_batch = self.tensors(jobs.join(micro_batches)), len(micro_batches[0]["x"])
        return bb.backward(loss_fn, batch, micro_batch=micro_batch, fused=self.fused)

    def gradient(self, micro_batches: Sequence[MicroBatch]) -> dict[str, np.ndarray | None]:
        self.door(micro_batches)
        gradients = {
            n: None if p.grad is None else p.grad.numpy(force=True).copy() for n, p in self.model.named_parameters()
        }
        self.optimizer.zero_grad()
        return gradients

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace:
        count, items = len(micro_batches), jobs.items(jobs.join(micro_batches))
        try:
            loss = self.door(micro_batches).item()
            skipped = None if math.isfinite(loss) else "not finite"
        except ValueError as error:
            loss, skipped = float("nan"), str(error)
        if skipped is None:
            if self.spec.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.spec.clip_norm)
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad()
        return SimpleNamespace(micro_batches=count, items=items, loss=loss, skipped=skipped)


def finite(micro_batches: Sequence[MicroBatch]) -> bool:
    """Where a product is inf or NaN, it cannot be compared with autograd's gradient, which is then taken."""
    return all(np.isfinite(array).all() for m in micro_batches for array in m.values())


class PlainLinear(Plain):
    model_class = LinearModel


class FusedStream(Stream):
    """Each finite window proves that it was fused: the same numbers could come from autograd."""

    model_class = LinearModel

    def window(self, micro_batches: Sequence[MicroBatch]) -> bb.Update | None:
        with must_fuse(len(micro_batches) if finite(micro_batches) else 0):
            return super().window(micro_batches)

    def feed(self, micro_batch: MicroBatch) -> bb.Update | None:
        with small_ones_too():
            return super().feed(micro_batch)

    def load(self, saved: bytes) -> None:
        with small_ones_too():
            super().load(saved)


class FusedTrainer(FusedStream, Trainer):
    """As `FusedStream`, and the window closes by its own count."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.acc = bb.Gradients(self.optimizer, spec.every)


class FusedSplit(Split):
    """As `FusedStream`."""

    model_class, fused = LinearModel, True

    def window(self, micro_batches: Sequence[MicroBatch]) -> SimpleNamespace:
        with must_fuse(len(micro_batches) if finite(micro_batches) else 0):
            return super().window(micro_batches)

    def door(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        with small_ones_too():
            return super().door(micro_batches)


class Adapter:
    absent, half, refusal = True, "bfloat16", ValueError

    def __init__(self, name: str, door: str, start: type[TorchRun], plain: type[TorchRun] = Plain):
        self.name, self.door, self.start, self.plain = f"torch-{name}", door, start, plain
        self.makes = bb.Gradients if name == "gradients" else bb.Accumulator
        self.model = torch.nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.options: dict[str, Any] = {}

    def mistakes(self) -> dict[str, Callable[[], Any]]:
        x, y = torch.ones(8, 2), torch.ones(7, 1)
        acc = self.makes(self.optimizer, every=1, **self.options)

        def split(batch: Any, micro_batch: Any = 2) -> Any:
            return bb.backward(lambda b: self.model(b["x"]).mean(), batch, micro_batch=micro_batch, **self.options)

        def stream(items: Any) -> Any:
            return acc.backward(self.model(x).mean(), items=items)

        def window(every: Any) -> Any:
            return self.makes(self.optimizer, every=every, **self.options)

        if self.door == "split":
            return at_the_split_door(split, x, y)
        return at_the_stream_door(stream, window)

    def untouched(self) -> Params:
        return {name: p.numpy(force=True).copy() for name, p in self.model.named_parameters()}


ADAPTERS = [
    Adapter("split", "split", Split),
    Adapter("stream", "stream", Stream),
    Adapter("gradients", "stream", Trainer),
]
if torch_products.AVAILABLE:
    ADAPTERS += [
        Adapter("split-fused", "split", FusedSplit, PlainLinear),
        Adapter("stream-fused", "stream", FusedStream, PlainLinear),
        Adapter("gradients-fused", "stream", FusedTrainer, PlainLinear),
    ]
