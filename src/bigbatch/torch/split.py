"""The split door: you hold the batch, and bigbatch stands where PyTorch takes a gradient."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from bigbatch import errors
from bigbatch.engines import torch_graph
from bigbatch.engines.torch_products import Products
from bigbatch.torch.checks import check_items, check_loss
from bigbatch.torch.ranks import Ranks, Sync, ranks_of
from bigbatch.torch.window import Window, is_wide, scale_

Batch = TypeVar("Batch")


def backward(
    loss_fn: Callable[[Batch], Tensor | tuple[Tensor, float | Tensor]],
    batch: Batch,
    *,
    micro_batch: int | Literal["auto"],
    dtype: torch.dtype | None = torch.float32,
    fused: bool = True,
    model: torch.nn.Module | None = None,
    sync: Sync = "window",
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
            `items` is a number above zero or a tensor of one element on the device.
        batch: any nesting of tuples, lists, dicts, dataclasses and mappings of tensors (or None) that share the
            length of their leading dimension. It is cut in order; the last micro-batch may be shorter.
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
        sync: when a fully_shard model adds up over the ranks: "window" or "micro_batch", as for `Accumulator`.

    Returns:
        The mean loss over all items, a detached scalar of at least float32.

    Raises:
        TypeError, ValueError: `micro_batch`, the batch, a loss or its items are not as described, or the mean loss
            is NaN. `.grad` is then what it was before the call, as after any error inside `loss_fn`.

    The host waits for the device once, after the last micro-batch, to see that the loss is a number.
    """
    ranks = None if model is None else ranks_of(model, sync)
    if ranks is not None and ranks.shards is not None and micro_batch == "auto":
        raise ValueError('micro_batch="auto" cannot be planned for shards. Pass a number with a fully_shard model.')
    if micro_batch != "auto":
        micro_batch = errors.check_micro_batch(micro_batch)
    with nullcontext() if ranks is None else ranks.working():
        lengths = [(where, len(leaf)) for where, leaf in leaves(batch, "batch")]
        nothing = ranks is not None and bool(lengths) and not any(length for _, length in lengths)
        length = 0 if nothing else errors.check_lengths(lengths)

    def run(size: int) -> tuple[Opened, Tensor | None]:
        opened = _window(loss_fn, batch, length, size, dtype, fused, ranks)
        return opened, _closed(opened, None, lengths) if ranks is None else None

    # A rank that runs out of memory does its own part again, and the others wait for it where all meet.
    with nullcontext() if ranks is None else ranks.working():
        if micro_batch == "auto" and length:
            from bigbatch.torch.auto import fitting  # which rehearses this door

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
    products = products and len(cuts) > 1  # one alone adds nothing up, and is autograd's to the bit
    try:
        for start, stop in cuts:
            result = loss_fn(_cut(batch, start, max(stop, start + 1)))
            if isinstance(result, tuple) and len(result) != 2:
                raise errors.not_a_loss(result)
            loss, items = result if isinstance(result, tuple) else (result, None)
            loss = check_loss(loss)
            if start == stop:
                items = loss.new_zeros(())  # a forward for the other ranks' sake, which counts for nothing
            elif items is None:
                items = stop - start
                if window.unit is None:
                    window.unit = length
            if ranks is not None:
                ranks.before(window, items, len(cuts))
            graph = _read(loss, products, explain=window.micro_batches == 0)
            if window.micro_batches == 0:
                window.products = Products(graph.multiplied)
                products = bool(graph.uses)  # the next micro-batches' are hardly others
            parameters = ranks.parameters if ranks is not None and sharded else graph.parameters
            new = [p for p in parameters if p not in before]
            for p in new:
                before[p], p.grad = p.grad, None
            if window.dtype is None and dtype is not None and is_wide(new, dtype):
                window.widen(before, dtype)
            window.backward(loss, check_items(items), parameters, graph=graph if products else None)
            loss_dtype = torch.promote_types(loss_dtype, loss.dtype)
    except BaseException:
        _put_back(before)
        raise
    return Opened(window, before, loss_dtype)


def _closed(opened: Opened, ranks: Ranks | None, lengths: list[tuple[str, int]]) -> Tensor:
    """Makes means of the sums and returns the loss's; after an error `.grad` is what it was."""
    window, before, loss_dtype = opened
    try:
        sums = window.close() if ranks is None else ranks.mean(window, before)
        if not sums.micro_batches:
            errors.check_lengths(lengths)  # no rank has an example, and this says so
        if math.isnan(sums.loss):
            raise errors.loss_not_finite(sums.loss, f"{sums.micro_batches} micro-batches")
        scale_(window.gradients(before), sums.factor)
        for p in window.sums:
            if before[p] is None:  # rounded here, where a lack of memory can still be taken back
                window.sums[p] = window.sums[p].to(p.dtype)
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
        p.grad = before if mean is None else mean.to(p.dtype)
    elif before.is_sparse:
        p.grad = (before + mean).to(p.dtype)
    else:
        p.grad = before.add_(mean)


def _read(loss: Tensor, products: bool, explain: bool) -> torch_graph.Graph:
    """The loss's graph, which has to show all leaves that the backward will give a gradient to."""
    graph = torch_graph.read(loss, products, explain)
    if "CheckpointFunctionBackward" in graph.functions:
        raise ValueError(
            "Reentrant checkpointing hides its parameters until the backward runs, so their gradients cannot be "
            "kept apart from what .grad holds. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )
    return graph


def parameters_of(loss: Tensor) -> list[Tensor]:
    """The leaves that `loss.backward()` will give a gradient to."""
    return _read(loss, products=False, explain=False).parameters


def children_of(batch: Any) -> list[tuple[str, Any, Any]] | None:
    """The parts of one level of nesting, each as (how it is written after the parent, its key, itself)."""
    if isinstance(batch, Mapping):
        return [(f"[{key!r}]", key, value) for key, value in batch.items()]
    if isinstance(batch, tuple | list):
        return [(f"[{i}]", i, value) for i, value in enumerate(batch)]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [(f".{f.name}", f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)]
    return None


def leaves(batch: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch, with the place where it stands."""
    children = children_of(batch)
    if children is not None:
        for written, _, child in children:
            yield from leaves(child, where + written)
    elif isinstance(batch, Tensor) and batch.ndim > 0:
        yield where, batch
    elif batch is not None:
        raise errors.leaf_without_length(where, batch)


def _cut(batch: Any, start: int, stop: int) -> Any:
    """The same nesting with every tensor cut to examples start … stop - 1, as views."""
    if type(batch) is tuple:  # the commonest batch, by the shortest way
        return tuple([_cut(child, start, stop) for child in batch])
    return mapped(batch, lambda leaf: leaf[start:stop])


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with every tensor changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    children = children_of(batch)
    if children is None:
        return batch
    cut = {key: mapped(child, change) for _, key, child in children}
    if isinstance(batch, Mapping):
        if not isinstance(batch, MutableMapping):
            return cut
        # A copy that is written into keeps the class and what else it holds: BatchEncoding, OrderedDict, UserDict.
        part = copy.copy(batch)
        part.update(cut)
        return part
    if isinstance(batch, list):
        return list(cut.values())
    if isinstance(batch, tuple):
        return type(batch)(*cut.values()) if hasattr(batch, "_fields") else tuple(cut.values())
    part = copy.copy(batch)
    for name, value in cut.items():
        object.__setattr__(part, name, value)  # frozen ones too, and no __init__ that would expect the whole batch
    return part
