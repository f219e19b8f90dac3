"""A window across ranks: one sum over all micro-batches of all ranks, and one reduction a window.

    g = Σᵣ Σᵢ nᵣᵢ·gᵣᵢ / Σᵣ Σᵢ nᵣᵢ

Every rank adds up what it sees. When the window closes the ranks meet: once for a few numbers (what each of them holds,
and which parameters have a gradient anywhere), then for the gradients, as the model keeps them: see `replicas` for
DistributedDataParallel and `shards` for fully_shard. After that all ranks hold the same mean, and do the same with it.

A rank at the end of its data says so in `flush`, and takes part in the others' windows until all have said so.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bigbatch import errors
from bigbatch.every import Items
from bigbatch.torch.collectives import or_lost
from bigbatch.torch.replicas import Replicas, at_least_float32
from bigbatch.torch.shards import Shards, power_of_two, shards_in
from bigbatch.torch.window import Sums, Window

Sync = Literal["window", "micro_batch"]


class Met(NamedTuple):
    """What the ranks told each other about a window.

    Attributes:
        sums: the items, the mean loss and the micro-batches of all ranks; the factor is this rank's own, unit / Σ n.
        ended: whether every rank is at the end of its data.
        dense, sparse: for each parameter, on how many ranks it has such a gradient.
    """

    sums: Sums
    ended: bool
    dense: list[float]
    sparse: list[float]


class Ranks:
    """The ranks that train one model, seen from one of them. Every method that adds up is collective.

    A `plan` is the number of micro-batches that a rank's window closes at, or `Items` over all ranks.

    Args:
        model: how the model is spread over them.
    """

    def __init__(self, model: Replicas | Shards):
        self.model = model
        self.parameters = model.parameters
        self.group = model.group
        self.size = dist.get_world_size(self.group)
        # Numbers meet on the host where the group can do that; a GPU then need not be waited for while counting items.
        on_host = "cpu:" in dist.get_backend_config(self.group)
        self.device = torch.device("cpu") if on_host else self.parameters[0].device

    @property
    def shards(self) -> Shards | None:
        """The model, where its parameters are spread over the ranks."""
        return self.model if isinstance(self.model, Shards) else None

    def agree(self, settings: dict[str, Any]) -> None:
        """Refuses, on every rank, what the ranks were not given alike.

        Raises:
            ValueError: two ranks have different settings; it names the first of them.
        """
        every_rank: list[Any] = [None] * self.size
        or_lost(dist.all_gather_object, every_rank, settings, group=self.group)
        names = [name for rank in every_rank for name in rank]
        for name in dict.fromkeys(names):
            values = [rank.get(name, "none") for rank in every_rank]
            if len(set(values)) > 1:
                raise errors.ranks_disagree(name, values)

    def before(self, window: Window, items: float | Tensor, plan: Any) -> None:
        """Before a micro-batch's backward: sharded gradients have to know now whether it is the window's last."""
        shards = self.shards
        if shards is None:
            return
        if window.unit is None:
            if shards.unit is None:
                # The ranks' gradients are added up before they can be weighted, so the weights have one unit. A power
                # of two, so that another one, after a restart, gives the same bits.
                (total,) = self.add_up([float(items) * window.planned])
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
        total, ended = self.add_up([float(items), ending])
        return total, ended == self.size

    def meet(self, window: Window, parameters: list[Tensor], ending: bool = False) -> Met:
        """One small reduction: what the ranks' windows hold. Here the host waits for the device.

        Raises:
            RuntimeError: a rank is gone, or raised an error while it was `working`.
            ValueError: the ranks add up in different dtypes.
        """
        loss, items, unit = window.read()
        window.products.settle()
        held = [window.sums.get(p, p.grad) for p in parameters]
        dense = [grad is not None and not grad.is_sparse for grad in held]
        sparse = [grad is not None and grad.is_sparse for grad in held]
        width = at_least_float32(window.dtype)
        micro_batches = window.micro_batches - window.repeats
        numbers = [loss * unit, items, micro_batches, ending, False, width.itemsize, *dense, *sparse]
        loss, items, micro_batches, ended, failed, widths, *counts = self.add_up(numbers)
        if failed:
            raise errors.rank_failed()
        if widths != width.itemsize * self.size:
            self.agree({"dtype": str(width)})
        mean, factor = (loss / items, unit / items) if items else (math.nan, 0.0)
        sums = Sums(items, mean, factor, int(micro_batches))
        return Met(sums, ended == self.size, counts[: len(held)], counts[len(held) :])

    def wait(self, window: Window, parameters: list[Tensor], plan: Any) -> tuple[Met, bool]:
        """At the end of this rank's data: what the next window holds, and whether it is everybody's last."""
        full = ended = False
        while isinstance(plan, Items) and not (full or ended):
            items, ended = self.count(window.items, ending=True)
            full = items >= plan.count
        met = self.meet(window, parameters, ending=True)
        return met, met.ended and not full

    def reduce(self, window: Window, parameters: list[Tensor], met: Met) -> Sums:
        """Replaces the rank's sums by those of all ranks; the factor is what they still need."""
        return met.sums._replace(factor=self.model.reduce(window, parameters, met))

    def cuts(self, window: Window, length: int, micro_batch: int) -> list[tuple[int, int]] | None:
        """Where the split door has to cut this rank's part of the batch; None where that is the rank's own business."""
        shards = self.shards
        if shards is None:
            return None
        rank = dist.get_rank(self.group)
        cuts = shards.cut(self.add_up([length if r == rank else 0 for r in range(self.size)]), rank, micro_batch)
        window.unit = shards.unit
        return cuts

    def in_step(self, loader: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """Micro-batches as often on every rank, since a sharded forward needs all; and whether one is a repetition.

        A rank at the end of its data repeats its last one while another has more. The ranks tell each other before
        each.

        Raises:
            ValueError: on every rank, where one has no micro-batch at all.
        """
        iterator, end = iter(loader), object()
        last: Any = end
        while True:
            following = next(iterator, end)
            (going,) = self.add_up([following is not end])
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
        """Holds the model's own reductions inside, and tells the others of an error here, who would wait for ever."""
        self.model.hold()
        try:
            yield
        except Exception:
            if self.shards is None:
                self.add_up([0, 0, 0, False, True, 0, *[0] * (2 * len(self.parameters))])
            else:
                self.shards.forget()  # the others are inside a forward or a backward, and cannot be told
            raise
        finally:
            self.model.hold(reduce=True)

    def mean(self, window: Window, before: dict[Tensor, Tensor | None]) -> Sums:
        """For the split door: replaces the rank's sums by the mean, and sets aside what other `.grad`s hold."""
        with self.working():
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
        return self.reduce(window, self.parameters, self.meet(window, self.parameters))

    def add_up(self, numbers: list[Any]) -> list[float]:
        """Each number, of all ranks together."""
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        or_lost(dist.all_reduce, sums, group=self.group)
        return sums.tolist()


def ranks_of(model: Any, sync: Sync = "window") -> Ranks | None:
    """The ranks that a model is trained on, or None where there is one process.

    Raises:
        TypeError, ValueError: several processes train it, and it is not wrapped in a way that is known here.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module. {errors.received('model', model)} "
            "Pass the DistributedDataParallel or fully_shard model that the forward goes through."
        )
    errors.check_choice("sync", sync, ("window", "micro_batch"))
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    replicas = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if bool(replicas) == bool(shards_in(model)):
        raise ValueError(
            "model must be wrapped in DistributedDataParallel or by fully_shard where there are several ranks. "
            f"Received: model of type {type(model).__name__}, {dist.get_world_size()} ranks. "
            "Without either the ranks would not even start from the same parameters."
        )
    ranks = Ranks(Replicas(replicas) if replicas else Shards(model, sync))
    return ranks if ranks.size > 1 else None


def described(parameters: Iterable[Tensor]) -> dict[str, str]:
    """What `Ranks.agree` compares of the parameters."""
    shapes = {
        f"parameter {i}": f"{tuple(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for i, p in enumerate(parameters)
    }
    return {"the number of parameters": str(len(shapes)), **shapes}
