"""The split door: you hold the batch, and bigbatch stands where PyTorch takes a gradient."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from bigbatch import errors
from bigbatch.fused import torch_graph
from bigbatch.fused.torch_deferred import Products
from bigbatch.fused.torch_graph import gradient_dtype
from bigbatch.fused.torch_proof import Known, Proof
from bigbatch.torch.batch import cut, leaves
from bigbatch.torch.checks import check_dtype, check_flag, check_items, check_loss
from bigbatch.torch.collectives import SPLIT
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.ownership import Ownership
from bigbatch.torch.window import Window, is_wide, scale_
from bigbatch.torch.wrapped import Sync, ranks_of

Batch = TypeVar("Batch")

# What calls have seen of weights, for the next calls.
_known = Known()


def backward(
    loss_fn: Callable[[Batch], Tensor | tuple[Tensor, float | Tensor]],
    batch: Batch,
    *,
    micro_batch: int | Literal["auto"],
    dtype: torch.dtype | None = torch.float32,
    fused: bool = True,
    model: torch.nn.Module | None = None,
    sync: Sync | None = None,
) -> Tensor:
    """Puts the whole batch's mean gradient into `.grad`, one micro-batch in memory at a time.

    What `loss_fn(batch).backward()` would do, with the activations of `micro_batch` examples instead of all of them.
    It adds to what `.grad` holds, as `Tensor.backward` does, and it steps no optimizer::

        optimizer.zero_grad()
        loss = bb.backward(loss_fn, (x, y), micro_batch=32)
        optimizer.step()

    Args:
        loss_fn: takes a micro-batch, nested as `batch` is, and returns its mean loss, a real scalar; or
            `(loss, items)` where the mean is over something other than the leading dimension, such as tokens.
            `items` is a number above zero or a tensor of one element on the device. A model's output that has the
            loss as `.loss` may stand in its place.
        batch: any nesting of tuples, lists, dicts, dataclasses and mappings of tensors (or None) that share the
            length of their leading dimension, and of lists of text as long. It is cut in order; the last micro-batch
            may be shorter.
        micro_batch: examples in memory at once. Larger than the batch is fine: one micro-batch. "auto" plans the
            largest that fits what is free (see `plan`), once for each shape of batch, and logs what it chose; should
            memory run out anyway, the window is done again with half the size. Not for a fully_shard model.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 parameters add up in float32
            and are rounded once, at the end. None adds up in the parameters' own dtype.
        fused: whether the gradients of weights that inputs are multiplied by, or rows are looked up in, go straight
            into the sums where that is safe (docs/pytorch.md). False leaves all to autograd: slower, and the same
            numbers.
        model: the DistributedDataParallel or fully_shard model that `loss_fn` calls, where several ranks train one
            model. Each passes its own part of the batch, of any length; all get the mean gradient and loss of the
            whole. The call is then collective.
        sync: when a fully_shard model adds up over the ranks: "window" (the default) or "micro_batch", as for
            `Accumulator`. Refused with other models.

    Returns:
        The mean loss over all items, a detached scalar of at least float32.

    Raises:
        TypeError, ValueError: `micro_batch`, the batch, a loss or its items are not as described, or the mean loss
            is NaN or infinite. `.grad` is then what it was before the call, as after any error inside `loss_fn`.
        RuntimeError: `loss_fn`, or a hook, writes to the gradients or the parameters: the window's until it returns.

    The host waits for the device once, after the last micro-batch, to see that the loss is a number.
    """
    ranks = ranks_of(model, sync, SPLIT)
    with nullcontext() if ranks is None else ranks.meetings.reporting(SPLIT):
        if ranks is not None and ranks.shards is not None and micro_batch == "auto":
            raise ValueError('micro_batch="auto" cannot be planned for shards. Pass a number with a fully_shard model.')
        if micro_batch != "auto":
            micro_batch = errors.check_micro_batch(micro_batch)
        check_dtype(dtype)
        check_flag("fused", fused)
        lengths = [(where, len(leaf)) for where, leaf in leaves(batch, "batch")]
        nothing = ranks is not None and bool(lengths) and not any(length for _, length in lengths)
        length = 0 if nothing else errors.check_lengths(lengths)

    def run(size: int) -> tuple[Opened, Tensor | None]:
        opened = _window(loss_fn, batch, length, size, dtype, fused, ranks)
        return opened, _closed(opened, None, lengths) if ranks is None else None

    # A rank that runs out of memory does its own part again, and the others wait for it where all meet.
    with nullcontext() if ranks is None else ranks.working():
        if micro_batch == "auto" and length:
            from bigbatch.torch.plan import fitting  # which rehearses this door

            opened, mean = fitting(run, loss_fn, batch, length, dtype)
        else:
            opened, mean = run(1 if micro_batch == "auto" else micro_batch)
    if mean is None:
        mean = _closed(opened, ranks, lengths)
    for p, grad in opened.before.items():
        _add(p, grad, opened.window.sums.get(p, p.grad))
    return mean


class Opened(NamedTuple):
    """A window with every micro-batch in it, what `.grad` held before, and the widest dtype of a loss."""

    window: Window
    before: dict[Tensor, Tensor | None]
    loss_dtype: torch.dtype


def _window(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    length: int,
    micro_batch: int,
    dtype: torch.dtype | None,
    fused: bool,
    ranks: Ranks | None,
) -> Opened:
    """Adds up the micro-batches; after an error `.grad` is what it was."""
    window = Window(planned=-(-length // micro_batch))
    if ranks is not None and is_wide(ranks.parameters, dtype):
        window.dtype = dtype
    before: dict[Tensor, Tensor | None] = {}
    loss_dtype = torch.float32
    sharded = ranks is not None and ranks.shards is not None
    products = fused and not sharded and (ranks is not None or torch_graph.is_alone())
    cuts = None if ranks is None else ranks.cuts(window, length, micro_batch)
    if cuts is None:
        cuts = [(start, min(start + micro_batch, length)) for start in range(0, length, micro_batch)]
    # One alone adds nothing up, and is autograd's to the bit.
    proof = Proof(_known, started=True) if products and len(cuts) > 1 else None
    # Nobody can drop it: an error inside loss_fn goes through the except below.
    owned = Ownership("bb.backward", lambda: None, in_grad=not sharded)
    try:
        for start, stop in cuts:
            loss, items = errors.loss_and_items(loss_fn(cut(batch, start, max(stop, start + 1))))
            loss = check_loss(loss)
            if start == stop:
                items = loss.new_zeros(())  # a forward for the other ranks' sake, which counts for nothing
            elif items is None:
                items = stop - start
                if window.unit is None:
                    window.unit = length
            if ranks is not None:
                ranks.before(window, items, len(cuts))
            graph = _read(loss, proof, explain=window.micro_batches == 0)
            if window.micro_batches == 0:
                window.products = Products(graph.multiplied)
                proof = proof if graph.has_products else None  # the next micro-batches' are hardly others
            parameters = ranks.parameters if ranks is not None and sharded else graph.parameters
            new = [p for p in parameters if p not in before]
            owned.check()
            owned.add(new)
            for p in new:
                before[p], p.grad = p.grad, None
            if window.dtype is None and dtype is not None and is_wide(new, dtype):
                window.widen(before, dtype)
                owned.record(anew=True)
            with owned:
                window.backward(loss, check_items(items), parameters, graph=graph if proof else None)
            owned.record()
            loss_dtype = torch.promote_types(loss_dtype, loss.dtype)
        owned.verify()
    except BaseException:
        _put_back(before)
        raise
    finally:
        owned.close()
    return Opened(window, before, loss_dtype)


def _closed(opened: Opened, ranks: Ranks | None, lengths: list[tuple[str, int]]) -> Tensor:
    """Makes means of the sums and returns the loss's; after an error `.grad` is what it was."""
    window, before, loss_dtype = opened
    try:
        sums = window.close() if ranks is None else ranks.mean(window, before)
        if not sums.micro_batches:
            errors.check_lengths(lengths)  # no rank has an example, and this says so
        if not (math.isfinite(sums.items) and sums.items > 0):
            raise errors.items_not_counts(sums.items, f"{sums.micro_batches} micro-batches")
        if not math.isfinite(sums.loss):
            raise errors.loss_not_finite(sums.loss, f"{sums.micro_batches} micro-batches")
        scale_(window.gradients(before), sums.factor)
        for p in window.sums:
            if before[p] is None:  # rounded here, where a lack of memory can still be taken back
                window.sums[p] = window.sums[p].to(gradient_dtype(p))
        return window.loss.new_full((), sums.loss, dtype=torch.promote_types(loss_dtype, window.loss.dtype))
    except BaseException:
        _put_back(before)
        raise


def _put_back(before: dict[Tensor, Tensor | None]) -> None:
    for p, grad in before.items():
        p.grad = grad


@torch.no_grad()
def _add(p: Tensor, before: Tensor | None, mean: Tensor | None) -> None:
    """`.grad` = what it held before + the window's mean, in place where autograd would add in place."""
    if before is None or mean is None:
        p.grad = before if mean is None else mean.to(gradient_dtype(p))
    elif before.is_sparse:
        p.grad = (before + mean).to(gradient_dtype(p))
    else:
        p.grad = before.add_(mean)


def _read(loss: Tensor, proof: Proof | None, explain: bool) -> torch_graph.Graph:
    """The loss's graph, which has to show all leaves that the backward will give a gradient to."""
    graph = torch_graph.read(loss, proof, explain)
    if "CheckpointFunctionBackward" in graph.functions:
        raise ValueError(
            "Reentrant checkpointing hides its parameters until the backward runs, so their gradients cannot be "
            "kept apart from what .grad holds. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )
    return graph


def parameters_of(loss: Tensor) -> list[Tensor]:
    """The leaves that `loss.backward()` will give a gradient to."""
    return _read(loss, None, explain=False).parameters
