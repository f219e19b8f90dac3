"""A window across ranks: one sum over all micro-batches of all ranks, and one reduction a window.

    g = Σᵣ Σᵢ nᵣᵢ·gᵣᵢ / Σᵣ Σᵢ nᵣᵢ

DistributedDataParallel reduces in a backward that it is told of beforehand, and divides by the number of ranks. Both
are wrong here: a window may close early, and ranks hold different numbers of items. So its own reduction is put off
for good, every rank adds up what it sees, and when the window closes the ranks meet: once for a few numbers (what each
of them holds, and which parameters have a gradient anywhere), then once for each bucket of gradients. A rank that
holds nothing brings zeros. After that all ranks hold the same mean, and do the same with it.

A rank at the end of its data says so in `flush`, and takes part in the others' windows until all have said so.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bigbatch import errors
from bigbatch.every import Items
from bigbatch.torch.window import Sums, Window, widened

BUCKET = 25 * 2**20
"""Bytes in a reduction, as in DistributedDataParallel: large enough for the network, small enough to lie twice."""


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
    """The ranks that share a DistributedDataParallel, seen from one of them. Every method is collective but `hold`.

    Args:
        models: the replicas; their own reductions are put off by `hold`.
    """

    def __init__(self, models: list[DistributedDataParallel]):
        self.models = models
        self.parameters: list[Tensor] = [p for model in models for p in model.parameters()]
        self.group = models[0].process_group
        self.size = dist.get_world_size(self.group)
        # Numbers meet on the host where the group can do that; a GPU then need not be waited for while counting items.
        on_host = "cpu:" in dist.get_backend_config(self.group)
        self.device = torch.device("cpu") if on_host else self.parameters[0].device

    def hold(self, reduce: bool = False) -> None:
        """Puts off the models' own reductions, and their broadcasts of buffers, until called with `reduce=True`."""
        for model in self.models:
            model.require_backward_grad_sync = reduce  # what no_sync() sets for the length of a context
            model.require_forward_param_sync = reduce

    def agree(self, settings: dict[str, Any]) -> None:
        """Refuses, on every rank, what the ranks were not given alike.

        Raises:
            ValueError: two ranks have different settings; it names the first of them.
        """
        every_rank: list[Any] = [None] * self.size
        _or_lost(dist.all_gather_object, every_rank, settings, group=self.group)
        names = [name for rank in every_rank for name in rank]
        for name in dict.fromkeys(names):
            values = [rank.get(name, "none") for rank in every_rank]
            if len(set(values)) > 1:
                raise errors.ranks_disagree(name, values)

    def count(self, items: float | Tensor, ending: bool = False) -> tuple[float, bool]:
        """The items in the open windows of all ranks, and whether every rank is at the end of its data."""
        total, ended = self._add_up([float(items), ending])
        return total, ended == self.size

    def meet(self, window: Window, parameters: list[Tensor], ending: bool = False) -> Met:
        """One small reduction: what the ranks' windows hold. Here the host waits for the device.

        Raises:
            RuntimeError: a rank is gone, or raised an error while it was `working`.
            ValueError: the ranks add up in different dtypes.
        """
        loss, items, unit = window.read()
        held = [window.sums.get(p, p.grad) for p in parameters]
        dense = [grad is not None and not grad.is_sparse for grad in held]
        sparse = [grad is not None and grad.is_sparse for grad in held]
        width = _at_least_float32(window.dtype)
        numbers = [loss * unit, items, window.micro_batches, ending, False, width.itemsize, *dense, *sparse]
        loss, items, micro_batches, ended, failed, widths, *counts = self._add_up(numbers)
        if failed:
            raise errors.rank_failed()
        if widths != width.itemsize * self.size:
            self.agree({"dtype": str(width)})
        mean, factor = (loss / items, unit / items) if items else (math.nan, 0.0)
        sums = Sums(items, mean, factor, int(micro_batches))
        return Met(sums, ended == self.size, counts[: len(held)], counts[len(held) :])

    @contextmanager
    def working(self) -> Iterator[None]:
        """Holds the models' own reductions inside, and tells the others of an error here, who would wait for ever."""
        self.hold()
        try:
            yield
        except Exception:
            self._add_up([0, 0, 0, False, True, 0, *[0] * (2 * len(self.parameters))])
            raise
        finally:
            self.hold(reduce=True)

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
            window.loss = p.new_zeros((), dtype=torch.promote_types(p.dtype, torch.float32))
        return self.reduce(window, self.parameters, self.meet(window, self.parameters))

    def wait(self, window: Window, parameters: list[Tensor], plan: object) -> tuple[Met, bool]:
        """At the end of this rank's data: what the next window holds, and whether it is everybody's last."""
        full = ended = False
        while isinstance(plan, Items) and not (full or ended):
            items, ended = self.count(window.items, ending=True)
            full = items >= plan.count
        met = self.meet(window, parameters, ending=True)
        return met, met.ended and not full

    @torch.no_grad()
    def reduce(self, window: Window, parameters: list[Tensor], met: Met) -> Sums:
        """Replaces the rank's sums by the mean over all ranks: one reduction a bucket, in float32 at least."""
        dtype = _at_least_float32(window.dtype)
        dense = [p for p, ranks in zip(parameters, met.dense, strict=True) if ranks]
        sparse = [p for p, ranks in zip(parameters, met.sparse, strict=True) if ranks]
        buckets = [self._launch(window, bucket, met.sums.factor, dtype) for bucket in _buckets(dense, dtype)]
        for p in sparse:
            rows = _take(window, p)
            if rows is None:
                # As an embedding has them: rows of the table, and here none.
                none = torch.empty(1, 0, dtype=torch.long, device=p.device), p.new_empty(0, *p.shape[1:])
                rows = torch.sparse_coo_tensor(*none, p.shape, check_invariants=False)
            rows = (rows.to(widened(p, dtype)) * met.sums.factor).coalesce()
            _or_lost(dist.all_reduce, rows, group=self.group)
            _put(window, p, rows)
        for bucket, means, work in buckets:
            _or_lost(work.wait)
            for p, mean in zip(bucket, means, strict=True):
                _put(window, p, mean)
        self._share_buffers()
        return met.sums._replace(factor=1.0)

    def _launch(
        self, window: Window, bucket: list[Tensor], factor: float, dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor], Any]:
        """Starts a bucket on its way. The gradients move into it, so that one bucket lies twice at a time, not all."""
        flat = bucket[0].new_empty(sum(p.numel() for p in bucket), dtype=widened(bucket[0], dtype))
        parts = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in bucket]), bucket, strict=True)]
        for p, part in zip(bucket, parts, strict=True):
            grad = _take(window, p)
            if grad is None:
                part.zero_()
            else:
                part.copy_(grad)
        if factor != 1.0:
            flat.mul_(factor)
        return bucket, parts, _or_lost(dist.all_reduce, flat, group=self.group, async_op=True)

    def _share_buffers(self) -> None:
        """Rank 0's buffers for all, such as BatchNorm's averages; the model itself would do it in every forward."""
        for model in self.models:
            buffers = list(model.module.buffers()) if model.broadcast_buffers else []
            for dtype in dict.fromkeys(b.dtype for b in buffers):
                several = [b for b in buffers if b.dtype == dtype]
                flat = torch.cat([b.reshape(-1) for b in several])
                _or_lost(dist.broadcast, flat, group=self.group, group_src=0)
                for b, part in zip(several, flat.split([b.numel() for b in several]), strict=True):
                    b.copy_(part.view_as(b))

    def _add_up(self, numbers: list[Any]) -> list[float]:
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        _or_lost(dist.all_reduce, total, group=self.group)
        return total.tolist()


def ranks_of(model: Any) -> Ranks | None:
    """The ranks that a model is trained on, or None where there is one process.

    Raises:
        TypeError, ValueError: several processes train it, and it is not wrapped in a way that is known here.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module. {errors.received('model', model)} "
            "Pass the DistributedDataParallel that the forward goes through."
        )
    models = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    if not models:
        raise ValueError(
            "model must be wrapped in DistributedDataParallel where there are several ranks. "
            f"Received: model of type {type(model).__name__}, {dist.get_world_size()} ranks. "
            "Without it the ranks would not even start from the same parameters."
        )
    if any(m.static_graph for m in models):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) reduces in its first backward, whatever it is told. "
            "Leave it out; here it has nothing to speed up."
        )
    return Ranks(models) if dist.get_world_size(models[0].process_group) > 1 else None


def described(parameters: Iterable[Tensor]) -> dict[str, str]:
    """What `Ranks.agree` compares of the parameters."""
    shapes = {
        f"parameter {i}": f"{tuple(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for i, p in enumerate(parameters)
    }
    return {"the number of parameters": str(len(shapes)), **shapes}


def _buckets(parameters: list[Tensor], dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Parameters whose gradients travel together: of one dtype and device, and `BUCKET` bytes or a single one."""
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in parameters:
        kind = widened(p, dtype), p.device
        bucket = open_.setdefault(kind, [])
        if bucket and (sum(q.numel() for q in bucket) + p.numel()) * kind[0].itemsize > BUCKET:
            yield open_.pop(kind)
            bucket = open_.setdefault(kind, [])
        bucket.append(p)
    yield from open_.values()


def _at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(dtype or torch.float32, torch.float32)


def _take(window: Window, p: Tensor) -> Tensor | None:
    grad, p.grad = p.grad, None
    return window.sums.pop(p, grad)


def _put(window: Window, p: Tensor, mean: Tensor) -> None:
    if window.dtype is None:
        p.grad = mean.to(p.dtype)
    else:
        window.sums[p] = mean


def _or_lost(collective: Any, *arguments: Any, **options: Any) -> Any:
    """A collective, and what to tell a rank whose partner is gone."""
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:  # DistBackendError and DistNetworkError too
        raise errors.rank_lost(error) from error
