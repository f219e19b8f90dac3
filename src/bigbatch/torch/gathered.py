"""`gathered`: the rows of all ranks on each of them, for a loss that compares examples of different ranks."""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigbatch import errors

_differentiated = False


def gathered(x: Tensor, group: Any = None) -> Tensor:
    """The rows of all ranks, in the order of the ranks, with gradients.

    Each rank computes the loss of all rows, and passes `items=1` to its `Accumulator`, for it is one loss::

        encode = bb.chunked(model, micro_batch=32)  # model: DistributedDataParallel
        acc = bb.Accumulator(optimizer, every=1, model=model)
        a, b = bb.gathered(encode(images)), bb.gathered(encode(texts))
        acc.backward(info_nce(a, b), items=1)

    Ranks may have different numbers of rows. `torch.distributed.nn.functional.all_gather` needs them alike.

    Args:
        x: of shape (rows, …); the same dtype and other dimensions on every rank. Labels may be gathered too.
        group: the process group; by default all ranks.

    Returns:
        A tensor of shape (rows of all ranks, …). Its gradients are added up over the ranks, in at least float32. It
        cannot be differentiated again. Without a process group, `x`.

    Raises:
        TypeError: `x` is not a tensor with rows.
        ValueError: on every rank, where two have another dtype or shape. Also when a window closes whose losses the
            ranks have weighted differently with `items`.

    A collective call; so is its backward. The host waits for the other ranks.
    """
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise TypeError(f"gathered takes a tensor with rows. {errors.received('x', x)}")
    if not (dist.is_available() and dist.is_initialized()):
        return x
    return _Gathered.apply(x, group)  # pyright: ignore[reportReturnType]


def take_differentiated() -> bool:
    """Whether gathered rows have been differentiated since the last question."""
    global _differentiated
    was, _differentiated = _differentiated, False
    return was


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        shapes: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(shapes, (len(x), f"rows of shape {tuple(x.shape[1:])} and dtype {x.dtype}"), group)
        lengths, kinds = zip(*shapes, strict=True)
        if len(set(kinds)) > 1:
            raise errors.ranks_disagree("what is gathered", kinds)
        # Collectives take tensors of one shape.
        padded = x.new_zeros((max(lengths), *x.shape[1:]))
        padded[: len(x)] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group)
        rank = dist.get_rank(group)
        ctx.group, ctx.rows = group, slice(*list(itertools.accumulate(lengths, initial=0))[rank : rank + 2])
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        global _differentiated
        _differentiated = True
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total, group=ctx.group)
        return total[ctx.rows].to(grad.dtype), None
