"""PyTorch's two doors on two ranks, under DistributedDataParallel: the laws hold for what the ranks do together.

Stream: both ranks are fed every micro-batch of a window, one of them with its weights and the other with zeros. Split:
the first rank holds the first half of the micro-batches and the second the rest, which may be nothing. What the ranks
report must be the same to the last bit.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bigbatch.torch as bb
from conformance import jobs
from conformance.adapters import torch as one
from conformance.jobs import MicroBatch, Params, Spec
from conformance.ranks_pool import pool

RANKS = 2


class Replica(one.TorchRun):
    """What is the same at both doors."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.rank = dist.get_rank()
        self.ddp = DistributedDataParallel(self.model)
        torch.manual_seed(RANKS * spec.seed + self.rank)  # each draws its own dropout

    def loss(self, m: dict[str, torch.Tensor]) -> torch.Tensor:
        weight = m["weight"]
        return self.ddp(m) @ (weight / weight.sum().clamp(min=1))

    def acts(self) -> dict[str, Callable[[], None]]:
        def wrapped() -> None:
            self.loss(self.tensors(jobs.window("net", (3,), seed=13)[0])).backward()

        def flags() -> None:
            with self.ddp.no_sync():
                pass
            self.ddp.require_backward_grad_sync = self.ddp.require_forward_param_sync = True

        return {**super().acts(), "backward()": wrapped, "require_backward_grad_sync": flags}

    def disturbed(self, micro_batches: Sequence[MicroBatch], place: int, name: str, ranks: Sequence[int]) -> Any:
        """Of a window in which these ranks do something: what was there right after it, and what came of it."""
        act, seen = self.acts()[name], []

        def acting() -> None:
            try:
                if self.rank in ranks:
                    act()
            finally:
                seen.append((self.params(), self.held()))

        try:
            report = self.disturb(micro_batches, place, acting)
        except Exception as error:
            return seen, error
        return seen, report

    def watched(self, on: bool) -> int:
        if on:
            self.waits = one.Waits()
            self.waits.__enter__()
        else:
            self.waits.__exit__(None, None, None)
        return self.waits.count


class Stream(Replica, one.Stream):
    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.acc = bb.Accumulator(
            self.optimizer,
            every=spec.every,
            clip_norm=spec.clip_norm,
            scheduler=self.scheduler,
            partial=spec.partial,
            model=self.ddp,
        )

    def feed(self, micro_batch: MicroBatch) -> bb.Update | None:
        m, items = self.tensors(micro_batch), jobs.items(micro_batch)
        # A mistake is every rank's; of what can be trained on, one rank gets the weights.
        if items > 0 and self.acc.pending % RANKS != self.rank:
            m["weight"], items = torch.zeros_like(m["weight"]), torch.zeros(())
        return _of_one_rank(self.acc.backward(self.loss(m), items=items))

    def flush(self) -> bb.Update | None:
        return _of_one_rank(self.acc.flush())


class Trainer(Replica, one.Trainer):
    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.acc = bb.Gradients(self.model.parameters(), model=self.ddp)

    def feed(self, micro_batch: MicroBatch) -> bb.Update | None:
        m, items = self.tensors(micro_batch), jobs.items(micro_batch)
        if items > 0 and self.acc.pending % RANKS != self.rank:
            m["weight"], items = torch.zeros_like(m["weight"]), torch.zeros(())
        last = self.acc.pending + 1 == self.spec.every
        return _of_one_rank(self.applied(self.acc.backward(self.loss(m), items=items, last=last)))

    def flush(self) -> Any:
        report = super().flush()
        return _of_one_rank(report) if self.spec.partial == "apply" else report


class Split(Replica, one.Split):
    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> SimpleNamespace:
        """Each rank has half of the micro-batches, and one that has fewer acts before its last."""
        half = -(-len(micro_batches) // RANKS)
        return super().disturb(micro_batches, min(place, half - 1), act)

    def door(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        half = -(-len(micro_batches) // RANKS)
        mine = micro_batches[self.rank * half : (self.rank + 1) * half]
        batch = jobs.join(mine) if mine else {name: a[:0] for name, a in micro_batches[0].items()}

        def loss_fn(m: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            if self.before_loss is not None:
                self.before_loss()
            return self.loss(m), m["weight"].sum()

        return bb.backward(loss_fn, self.tensors(batch), micro_batch=len(micro_batches[0]["x"]), model=self.ddp)


def _of_one_rank(update: bb.Update | None) -> bb.Update | None:
    """Every rank counts each micro-batch, and all but one of them count it with no items."""
    return update and replace(update, micro_batches=update.micro_batches // RANKS)


runs: dict[int, Any] = {}  # in a rank: what it was told to start
numbers = itertools.count()


def start(number: int, door: str, spec: Spec) -> None:
    runs[number] = {"stream": Stream, "gradients": Trainer, "split": Split}[door](spec)


def call(number: int, name: str, *arguments: Any) -> Any:
    return getattr(runs[number], name)(*arguments)


def acts_of(number: int) -> list[str]:
    return list(runs[number].acts())


def pending(number: int) -> int:
    return runs[number].pending


class Together:
    """One training on all ranks."""

    def __init__(self, door: str, spec: Spec):
        self.number, self.ranks = next(numbers), pool(RANKS)
        self.after_act: list[Any] = []
        self.ranks.run(start, self.number, door, spec)

    def __call__(self, name: str, *arguments: Any) -> Any:
        first, *others = self.ranks.run(call, self.number, name, *arguments)
        for other in others:
            _alike(first, other, name)
        return first

    def window(self, micro_batches: Sequence[MicroBatch]) -> Any:
        return self("window", micro_batches)

    def feed(self, micro_batch: MicroBatch) -> Any:
        return self("feed", micro_batch)

    def gradient(self, micro_batches: Sequence[MicroBatch]) -> Any:
        return self("gradient", micro_batches)

    def flush(self) -> Any:
        return self("flush")

    def reset(self) -> None:
        self("reset")

    def params(self) -> Params:
        return self.after_act.pop(0) if self.after_act else self("params")

    def held(self) -> list[np.ndarray]:
        return self.after_act.pop(0) if self.after_act else self("held")

    def acts(self) -> dict[str, Callable[[], None]]:
        """All ranks do the same. The ranks are in their window by themselves, so the whole of it happens in the act."""
        names = self.ranks.run(acts_of, self.number)[0]
        return {name: lambda name=name: self._disturb(name) for name in names}

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> Any:
        self.window_and_place = micro_batches, place
        act()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def _disturb(self, name: str) -> None:
        arguments = (*self.window_and_place, name, range(RANKS))
        answers = self.ranks.run(call, self.number, "disturbed", *arguments)
        for seen, _ in answers:
            assert len(seen) == 1, f"the act took place {len(seen)} times on one rank"
            _alike(list(seen[0]), list(answers[0][0][0]), name)
        self.after_act, self.outcome = list(answers[0][0][0]), answers[0][1]
        for _, outcome in answers:
            assert isinstance(outcome, Exception) == isinstance(self.outcome, Exception), f"{name}: {answers}"

    def updates(self) -> int:
        return self("updates")

    def ema(self) -> Params:
        return self("ema")

    @property
    def pending(self) -> int:
        return self.ranks.run(pending, self.number)[0]

    def save(self) -> list[bytes]:
        """Every rank's own: inside a window each holds another sum."""
        return self.ranks.run(call, self.number, "save")

    def load(self, saved: list[bytes]) -> None:
        self.ranks.run(call, self.number, "load", each=saved)

    def watch(self, work: Callable[[], Any]) -> tuple[int, int]:
        self.ranks.run(call, self.number, "watched", True)
        work()
        return 0, max(self.ranks.run(call, self.number, "watched", False))


def _alike(a: Any, b: Any, what: str) -> None:
    if isinstance(a, dict):
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            _alike(x, y, what)
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, f"the ranks differ in {what}")
    elif isinstance(a, bb.Update | SimpleNamespace):
        assert repr(a) == repr(b), f"the ranks differ in {what}"
    else:
        assert a == b, f"the ranks differ in {what}"


def make(door: str, name: str) -> None:
    """Makes a mistake as a user does: with the same call on every rank."""
    adapter = one.Adapter(door, "split" if door == "split" else "stream", one.Stream)
    adapter.options = {"model": DistributedDataParallel(adapter.model)}
    before = adapter.untouched()
    try:
        adapter.mistakes()[name]()
    finally:
        _alike(adapter.untouched(), before, name)


class Adapter(one.Adapter):
    def __init__(self, door: str):
        super().__init__(door, "split" if door == "split" else "stream", one.Stream)
        self.name, self.start = f"ddp-{door}", lambda spec: Together(door, spec)

    def mistakes(self) -> dict[str, Callable[[], Any]]:
        return {
            name: lambda name=name: pool(RANKS).run(make, self.name.removeprefix("ddp-"), name)
            for name in super().mistakes()
        }


ADAPTERS = [Adapter("stream"), Adapter("gradients"), Adapter("split")]
