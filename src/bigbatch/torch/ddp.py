"""DistributedDataParallel in a window: whole gradients on every rank, added up in buckets when the window closes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bigbatch.engines.torch_dtypes import gradient_dtype, widened
from bigbatch.torch.collectives import Meetings
from bigbatch.torch.window import Window, WindowTotals

BUCKET = 25 * 2**20
"""Bytes in a reduction, as in DistributedDataParallel: large for the network, small enough to be in memory twice."""


class Replicas:
    """The replicas of this rank. `disable_grad_sync` switches off their own reductions.

    Those are decided in a forward, happen in its backward, and divide by the number of ranks. A window may close at any
    time, and its mean is over items.
    """

    def __init__(self, models: list[DistributedDataParallel]):
        for model in models:
            if model.static_graph:
                raise ValueError(
                    "DistributedDataParallel(static_graph=True) reduces in its first backward, whatever its flags say. "
                    "Leave it out; here it has nothing to speed up."
                )
            ignored = [name for name, _ in model.module.named_parameters() if name in model.parameters_to_ignore]
            if ignored:
                raise ValueError(
                    "DistributedDataParallel was made to leave parameters out of its reduction, and a window's mean is "
                    f"over all ranks. Received: {ignored[0]}, ignored or delayed. Let it own every parameter."
                )
        self.models = models
        self.parameters: list[Tensor] = [p for model in models for p in model.parameters()]
        self.meetings = Meetings(models[0].process_group, self.parameters[0].device)

    def disable_grad_sync(self, lasting: bool = False) -> Callable[[], None]:
        """Switches off the models' own reductions and broadcasts of buffers; the returned function ends that.

        It restores the flags as they were before, or where it is `lasting` sets them: `no_sync()` may be around the
        start. It sets them before every forward, since `no_sync()`, Accelerate and Lightning set the same flags at any
        time, and what a forward finds there decides.
        """
        flags = [(m, m.require_backward_grad_sync, m.require_forward_param_sync) for m in self.models]
        hooks = [model.register_forward_pre_hook(_disable) for model in self.models]

        def release() -> None:
            for hook in hooks:
                hook.remove()
            for model, backward, forward in flags:
                model.require_backward_grad_sync = backward or lasting
                model.require_forward_param_sync = forward or lasting

        for model in self.models:
            _disable(model)
        return release

    def before(self) -> None:
        """Before a backward, which is to reduce nothing, even if its forward found the flags set."""
        for model in self.models:
            if model._join_config.enable:  # no public name tells that join() is open: tests/ranks/test_flags.py
                raise RuntimeError(
                    "DistributedDataParallel.join() sends messages of its own between a window's. "
                    "Leave it out: flush() waits for the ranks that have more data."
                )
            # No public name resets what a forward has prepared in the reducer: tests/ranks/test_flags.py.
            model.reducer._reset_state()

    def values(self) -> dict[str, str]:
        """A checksum of each parameter: replicas start from the same values."""
        return {f"the values of parameter {i}": str(_bits(p)) for i, p in enumerate(self.parameters)}

    @torch.no_grad()
    def reduce(self, window: Window, parameters: list[Tensor], totals: WindowTotals) -> float:
        """Replaces the rank's sums by the mean over all ranks: one reduction a bucket, in float32 at least."""
        dtype = at_least_float32(window.dtype)
        dense = [p for p, ranks in zip(parameters, totals.dense, strict=True) if ranks]
        sparse = [p for p, ranks in zip(parameters, totals.sparse, strict=True) if ranks]
        buckets = [self._launch(window, bucket, totals.factor, dtype) for bucket in _buckets(dense, dtype)]
        for p in sparse:
            rows = _drain(window, p)
            if rows is None:
                # As an embedding has them: rows of the table, and here none.
                none = torch.empty(1, 0, dtype=torch.long, device=p.device), p.new_empty(0, *p.shape[1:])
                rows = torch.sparse_coo_tensor(*none, p.shape, check_invariants=False)
            rows = (rows.to(widened(p, dtype)) * totals.factor).coalesce()
            self.meetings.collective(dist.all_reduce, rows, group=self.meetings.group)
            _put(window, p, rows.detach())
        for bucket, means, work in buckets:
            self.meetings.collective(work.wait)
            for p, mean in zip(bucket, means, strict=True):
                _put(window, p, mean)
        self._share_buffers()
        return 1.0

    def _launch(
        self, window: Window, bucket: list[Tensor], factor: float, dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor], Any]:
        """Starts a bucket's reduction. Its gradients move into it, so that one bucket is in memory twice, not all."""
        flat = bucket[0].new_empty(sum(p.numel() for p in bucket), dtype=widened(bucket[0], dtype))
        parts = [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in bucket]), bucket, strict=True)]
        for p, part in zip(bucket, parts, strict=True):
            grad = _drain(window, p)
            if grad is None:
                part.zero_()
            else:
                part.copy_(grad)
        if factor != 1.0:
            flat.mul_(factor)
        group = self.meetings.group
        return bucket, parts, self.meetings.collective(dist.all_reduce, flat.detach(), group=group, async_op=True)

    def _share_buffers(self) -> None:
        """Rank 0's buffers for all, such as BatchNorm's averages; the model itself would do it in every forward."""
        for model in self.models:
            buffers = list(model.module.buffers()) if model.broadcast_buffers else []
            for dtype in dict.fromkeys(b.dtype for b in buffers):
                alike = [b for b in buffers if b.dtype == dtype]
                flat = torch.cat([b.reshape(-1) for b in alike])
                self.meetings.collective(dist.broadcast, flat, group=self.meetings.group, group_src=0)
                for b, part in zip(alike, flat.split([b.numel() for b in alike]), strict=True):
                    b.copy_(part.view_as(b))


def _disable(model: Any, *_: Any) -> None:
    model.require_backward_grad_sync = model.require_forward_param_sync = False  # as no_sync() does, for a forward


@torch.no_grad()
def _bits(p: Tensor) -> int:
    """A sum that does not depend on its order: the bits as integers, which wrap around."""
    whole = torch.view_as_real(p) if p.is_complex() else p
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()]
    return int(whole.detach().contiguous().view(integers).sum(dtype=torch.int64))


def _buckets(parameters: list[Tensor], dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Parameters whose gradients travel together: of one dtype and device, and `BUCKET` bytes or a single one."""
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for p in parameters:
        kind = widened(p, dtype), p.device
        size = p.numel() * kind[0].itemsize
        bucket, filled = open_.get(kind, ([], 0))
        if bucket and filled + size > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(p)
        open_[kind] = bucket, filled + size
    yield from (bucket for bucket, _ in open_.values())


def at_least_float32(dtype: torch.dtype | None) -> torch.dtype:
    """What gradients are added up in on their way between ranks."""
    return torch.promote_types(dtype or torch.float32, torch.float32)


def _drain(window: Window, p: Tensor) -> Tensor | None:
    grad, p.grad = p.grad, None
    return window.sums.pop(p, grad)


def _put(window: Window, p: Tensor, mean: Tensor) -> None:
    if window.dtype is None:
        p.grad = mean.to(gradient_dtype(p))
    else:
        window.sums[p] = mean
