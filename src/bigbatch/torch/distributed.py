"""A window across ranks: one sum over all micro-batches of all ranks, and one reduction a window.

    g = Σᵣ Σᵢ nᵣᵢ·gᵣᵢ / Σᵣ Σᵢ nᵣᵢ

Every rank adds up its own micro-batches. When the window closes the ranks meet: once for a few numbers (what each of
them holds, see `collectives`), then for the gradients, as the model keeps them: see `ddp` and `fsdp`. After that all
ranks hold the same mean, and do the same with it.

A rank at the end of its data reports that in `flush`, and takes part in the others' windows until all have done so.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bigbatch import errors
from bigbatch.every import Items
from bigbatch.noise import UntilNoise
from bigbatch.torch.collectives import BACKWARD, FLUSH, JOIN, SPLIT, digest_of
from bigbatch.torch.ddp import Replicas, at_least_float32
from bigbatch.torch.fsdp import Shards, power_of_two
from bigbatch.torch.gathered import take_differentiated
from bigbatch.torch.window import Window, WindowTotals


class Ranks:
    """The ranks that train one model, seen from one of them. Every method that adds up is collective.

    A `plan` is the number of micro-batches that a rank's window closes at, or `Items` over all ranks. `terms` are what
    all ranks must have alike, by name.

    Args:
        model: how the model is spread over them.
    """

    def __init__(self, model: Replicas | Shards):
        self.model, self.parameters = model, model.parameters
        self.meetings, self.size = model.meetings, model.meetings.size

    @property
    def shards(self) -> Shards | None:
        """The model, where its parameters are spread over the ranks."""
        return self.model if isinstance(self.model, Shards) else None

    def disable_grad_sync(self, owner: Any) -> None:
        """Switches off the model's own reductions for as long as `owner` lives."""
        weakref.finalize(owner, self.model.disable_grad_sync(lasting=True)).atexit = False

    @contextmanager
    def agreeing(self, call: str) -> Iterator[dict[Any, Any]]:
        """Yields terms to be filled in. At the end the ranks meet, even if one has raised an error inside.

        Raises:
            ValueError: on every rank, where two have different terms; it names the first.
            RuntimeError: another rank has raised an error inside.
        """
        terms: dict[Any, Any] = {}
        with self.meetings.reporting(call):
            yield terms
        self.agree(call, terms)

    def agree(self, call: str, terms: dict[Any, Any], numbers: Iterable[float] = ()) -> list[list[float]]:
        """Numbers of each rank, and that the terms are alike."""
        lines = self.meetings.gather(call, list(numbers), digest_of(terms))
        self.meetings.agree(terms, lines)
        return [line[1:] for line in lines]

    def check(self, every: Any, noise: Any, scaler: Any) -> None:
        """Refuses options of an Accumulator that ranks do not have."""
        if isinstance(every, UntilNoise):
            raise ValueError(
                "Ranks do not close a window by its noise together. "
                f"Received: every={every}, {self.size} ranks. Pass a number of micro-batches or bb.items(n)."
            )
        if noise is not False and self.shards is not None:
            raise ValueError(
                f"The noise scale needs a micro-batch's whole gradient. Received: noise={noise}, and shards. "
                "Measure it with DistributedDataParallel or in one process."
            )
        if scaler is not None and self.shards is not None:
            raise ValueError(f"scaler does not know shards. {errors.received('scaler', scaler)} Use bfloat16.")

    def agree_to_open(self, index: int, plan: Any) -> None:
        """Under fully_shard a window ends in the same backward on all ranks, whatever each one's `every` answers."""
        if self.shards is not None:
            self.agree(BACKWARD, {f"every, for update {index}": plan})

    def before(self, window: Window, items: float | Tensor, plan: Any) -> None:
        """Before a micro-batch's backward: sharded gradients have to know now whether it is the window's last."""
        shards = self.model
        if not window.micro_batches:
            take_differentiated()  # in a window that an error has dropped
        if isinstance(shards, Replicas):
            return shards.before()
        if window.unit is None:
            if shards.unit is None:
                # The ranks' gradients are added up before they can be weighted, so the weights have one unit. A power
                # of two, so that another one, after a restart, gives the same bits.
                (total,) = self.add_up(BACKWARD, float(items) * window.planned)
                shards.unit = power_of_two(total)
            window.unit = shards.unit
        if isinstance(plan, Items):
            total, _ = self.count(window.items + items)
            last = total >= plan.count
        else:
            last = window.micro_batches + 1 >= plan
        shards.before(window, last)

    def full(self, window: Window, plan: Any) -> bool:
        """After a micro-batch's backward: whether the window closes now, on all ranks where items are counted."""
        if self.shards is not None:
            return self.shards.after()
        return self.count(window.items)[0] >= plan.count if isinstance(plan, Items) else window.micro_batches >= plan

    def count(self, items: float | Tensor, ending: bool = False) -> tuple[float, bool]:
        """The items in the open windows of all ranks, and whether every rank is at the end of its data."""
        total, ended = self.add_up(FLUSH if ending else BACKWARD, float(items), ending)
        return total, ended == self.size

    def check_window(self, owned: Any) -> None:
        """That the open window's gradients are as its last micro-batch left them.

        Raises:
            RuntimeError: they were written to.
        """
        if owned is not None:
            owned.check()
        if self.shards is not None:
            self.shards.check_untouched()

    def refuse(self, error: Exception, window: Window, loss: Any, plan: Any) -> bool:
        """Reports a micro-batch that this rank refuses. Returns whether the window may stay open.

        It may where every rank has refused its micro-batch. Under fully_shard the others are in their backward, and
        need this rank there. So it runs a backward of zeros, and the error is reported when the window closes.
        """
        shards = self.shards
        if shards is None:
            return self.meetings.report(BACKWARD, error) and not isinstance(error, RuntimeError)
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            self.meetings.lost = error  # the others are in that backward, and no meeting reaches them
            return False
        self.before(window, 0.0, plan)
        torch.autograd.backward(loss, torch.zeros_like(loss))
        window.micro_batches += 1
        shards.failed = error
        if self.full(window, plan):
            self.meetings.report(BACKWARD, error)
            return False
        return True

    def reduce_totals(
        self, call: str, window: Window, parameters: list[Tensor], terms: dict[Any, Any], ending: bool = False
    ) -> WindowTotals:
        """What the ranks' windows hold together. Here the host waits for the device.

        Raises:
            RuntimeError: a rank is gone, has failed, or is at another call.
            ValueError: the ranks have different terms.
        """
        if self.shards is not None:
            with self.meetings.reporting(call):
                self.shards.check()
        loss, items, unit = window.read()
        window.flush()
        gradients = [window.sums.get(p, p.grad) for p in parameters]
        dense = [grad is not None and not grad.is_sparse for grad in gradients]
        sparse = [grad is not None and grad.is_sparse for grad in gradients]
        numbers = loss * unit, items, window.micro_batches - window.repeats, ending, digest_of((dense, sparse))
        # A rank at the end of its data has none: what it differentiated was before this window.
        if take_differentiated() and window.micro_batches and self.shards is None:
            # Each rank's gradient of gathered rows has all ranks' weights in it.
            terms = {**terms, "items, where losses are of gathered rows": f"{items:g}, after {unit:g} were planned"}
        lines = self.agree(call, terms, numbers)
        loss, items, micro_batches, ended, *_ = (sum(numbers) for numbers in zip(*lines, strict=True))
        if len({line[4] for line in lines}) == 1:
            counts = [float(has * self.size) for has in (*dense, *sparse)]
        else:
            counts = self.meetings.all_reduce([*dense, *sparse])
        mean, factor = (loss / items, unit / items) if items else (math.nan, 0.0)
        count = len(gradients)
        return WindowTotals(
            items, mean, factor, int(micro_batches), ended == self.size, counts[:count], counts[count:]
        )  # fmt: skip

    def join(
        self, window: Window, parameters: list[Tensor], plan: Any, terms: dict[Any, Any]
    ) -> tuple[WindowTotals, bool]:
        """At the end of this rank's data: what the ranks' next window holds, and whether it is the last of all."""
        full = ended = False
        while isinstance(plan, Items) and not (full or ended):
            items, ended = self.count(window.items, ending=True)
            full = items >= plan.count
        totals = self.reduce_totals(FLUSH, window, parameters, terms, ending=True)
        return totals, totals.ended and not full

    def reduce(self, window: Window, parameters: list[Tensor], totals: WindowTotals) -> WindowTotals:
        """Replaces the rank's sums by those of all ranks; the factor is what they still need."""
        try:
            return totals._replace(factor=self.model.reduce(window, parameters, totals))
        except Exception as error:
            self.meetings.lost = self.meetings.lost or error  # the others are in the middle of it
            raise

    def slices(self, window: Window, length: int, micro_batch: int) -> list[tuple[int, int]] | None:
        """Where the split API has to cut this rank's part of the batch; None where each rank may cut its own way."""
        shards = self.shards
        if shards is None:
            return None
        lengths = [line[1] for line in self.meetings.gather(SPLIT, [length])]
        slices = shards.slices(lengths, self.meetings.rank, micro_batch)
        window.unit = shards.unit
        return slices

    def parts(self, window: Window, length: int, own: int) -> int:
        """How many micro-batches this rank makes of its part: with shards as many as every other, else its own."""
        shards = self.shards
        if shards is None:
            return own
        lines = self.meetings.gather(SPLIT, [length, own])
        window.unit = shards.check_parts([line[1] for line in lines])
        return int(max(line[2] for line in lines))

    def in_step(self, loader: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """As many micro-batches on every rank, since a sharded forward needs all; and whether one is a repetition.

        A rank at the end of its data repeats its last one while another has more. The ranks meet before each.

        Raises:
            ValueError: on every rank, where one has no micro-batch at all.
        """
        iterator, end = iter(loader), object()
        last: Any = end
        while True:
            with self.meetings.reporting(JOIN):
                following = next(iterator, end)
            (going,) = self.add_up(JOIN, following is not end)
            if not going:
                return
            if last is end and going < self.size:
                raise ValueError(
                    f"fully_shard's forward needs every rank. Received: {int(going)} of {self.size} ranks with a "
                    "micro-batch. Give every rank at least one."
                )
            repeated = following is end
            last = last if repeated else following
            yield last, repeated

    @contextmanager
    def working(self) -> Iterator[None]:
        """Switches off the model's own reductions inside, and reports an error to the ranks that wait for this one."""
        release = self.model.disable_grad_sync()
        try:
            yield
        except Exception as error:
            if self.shards is None:
                self.meetings.report(SPLIT, error)
            else:
                self.shards.forget()  # the others are inside a forward or a backward, and no meeting reaches them
            raise
        finally:
            release()

    def mean(self, window: Window, before: dict[Tensor, Tensor | None]) -> WindowTotals:
        """For the split API: replaces the rank's sums by the mean, and sets aside what other `.grad`s hold."""
        with self.meetings.reporting(SPLIT):
            strange = [p for p in before if p not in set(self.parameters)]
            if strange:
                raise ValueError(
                    f"The loss reaches a parameter that is not the model's. {errors.received('parameter', strange[0])} "
                    "Ranks add up the gradients of model.parameters() only; put it into the model."
                )
        for p in self.parameters:
            if p not in before:
                before[p], p.grad = p.grad, None
        if window.micro_batches == 0:
            p = self.parameters[0]
            window.loss = torch.zeros((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        if self.shards is not None:
            self.shards.after()
        terms = {"dtype": at_least_float32(window.dtype)}
        return self.reduce(window, self.parameters, self.reduce_totals(SPLIT, window, self.parameters, terms))

    def add_up(self, call: str, *numbers: float) -> list[float]:
        """Each number, of all ranks together."""
        lines = [line[1 : 1 + len(numbers)] for line in self.meetings.gather(call, numbers)]
        return [sum(column) for column in zip(*lines, strict=True)]
