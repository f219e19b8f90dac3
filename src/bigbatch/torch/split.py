"""The split API: you hold the batch, and bigbatch stands where PyTorch takes a gradient."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from bigbatch import errors
from bigbatch.engines.torch_dtypes import gradient_dtype, is_wide
from bigbatch.lengths import Tokens
from bigbatch.torch.batch import cut as batch_slice
from bigbatch.torch.batch import leaves
from bigbatch.torch.checks import check_dtype, check_flag, check_items, check_loss
from bigbatch.torch.collectives import SPLIT
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.lengths import Layout
from bigbatch.torch.ownership import Ownership
from bigbatch.torch.plan import auto, auto_tokens
from bigbatch.torch.window import Window, fused_path, scale_
from bigbatch.torch.wrapped import Sync, ranks_of

Batch = TypeVar("Batch")


def backward(
    loss_fn: Callable[[Batch], Tensor | tuple[Tensor, float | Tensor]],
    batch: Batch,
    *,
    micro_batch: int | Literal["auto"] | Tokens,
    dtype: torch.dtype | None = torch.float32,
    fused: bool = True,
    model: torch.nn.Module | None = None,
    sync: Sync | None = None,
    cut: Callable[[Batch, Tensor], Batch] | None = None,
    length: int | None = None,
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
            memory run out anyway, the window is run again with half the size. Not for a fully_shard model.
            `bb.tokens(16_384, mask="attention_mask")` puts sequences of like length together and trims their padding;
            `loss_fn` then returns its items, for a mean over tokens and one over examples are no longer alike.
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
        cut: makes a micro-batch where rows of the batch belong together: a function of the batch and of the indices of
            examples, an integer tensor on the host, in order. Of DPO's batch, whose chosen rows come first and then the
            rejected ones, `lambda batch, i: batch[torch.cat([i, i + pairs])]`. Not with "auto" or `bb.tokens`.
        length: how many examples `cut` has to index, such as the number of pairs; the loss is their mean where
            `loss_fn` returns no items.

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
        call = _Call(loss_fn, batch, cut, [], 0, None, dtype, fused, ranks)
        call, size = _checked(call, micro_batch, length)

    def run(size: int) -> tuple[_Summed, Tensor | None]:
        summed = _add_up(call, size)
        return summed, _means(call, summed) if ranks is None else None

    # A rank that runs out of memory runs its own part again, and the others wait for it where all meet.
    with nullcontext() if ranks is None else ranks.working():
        if size != "auto" or not call.length:
            summed, mean = run(1 if size == "auto" else size)
        elif call.layout is not None:
            summed, mean = auto_tokens(run, loss_fn, call.layout, dtype)
        else:
            summed, mean = auto(run, loss_fn, batch, call.length, dtype)
    if mean is None:
        mean = _means(call, summed)
    for p, grad in summed.before.items():
        _add_to_grad(p, grad, summed.window.sums.get(p, p.grad))
    return mean


class _Call(NamedTuple):
    """What one call of `backward` works on."""

    loss_fn: Callable[[Any], Any]
    batch: Any
    cut: Callable[[Any, Tensor], Any] | None  # the user's
    lengths: list[tuple[str, int]]  # of the batch's leaves, each with its place
    length: int
    layout: Layout | None  # of the tokens, where micro-batches are cut by them
    dtype: torch.dtype | None
    fused: bool
    ranks: Ranks | None

    @property
    def sharded(self) -> bool:
        """Whether fully_shard has spread the parameters over the ranks."""
        return self.ranks is not None and self.ranks.shards is not None


def _checked(call: _Call, micro_batch: Any, length: int | None) -> tuple[_Call, Any]:
    """The call with what is known of the batch; and the examples or tokens of a micro-batch, or "auto"."""
    tokens = micro_batch if isinstance(micro_batch, Tokens) else None
    size: Any = micro_batch if tokens is None else tokens.most
    if call.sharded and size == "auto":
        raise ValueError('micro_batch="auto" cannot be planned for shards. Pass a number with a fully_shard model.')
    if size != "auto":
        size = errors.check_micro_batch(size)
    check_dtype(call.dtype)
    check_flag("fused", call.fused)
    errors.check_cut(call.cut, length)
    if length is not None:
        if tokens is not None or size == "auto":
            raise ValueError(
                f"cut makes micro-batches of a number of examples. {errors.received('micro_batch', micro_batch)} "
                "Pass a number."
            )
        return call._replace(lengths=[("length", length)], length=length), size
    lengths = [(where, len(leaf)) for where, leaf in leaves(call.batch, "batch")]
    empty = call.ranks is not None and bool(lengths) and not any(count for _, count in lengths)
    call = call._replace(lengths=lengths, length=0 if empty else errors.check_lengths(lengths))
    return call if tokens is None or empty else call._replace(layout=Layout.of(call.batch, tokens)), size


class _Part(NamedTuple):
    """A micro-batch that is cut when its turn comes. One of 0 examples is a forward for the other ranks' sake."""

    examples: int
    cut: Callable[[], Any]


class _Summed(NamedTuple):
    """A window with every micro-batch in it, what `.grad` held before, and the widest dtype of a loss."""

    window: Window
    before: dict[Tensor, Tensor | None]
    loss_dtype: torch.dtype


def _add_up(call: _Call, micro_batch: int) -> _Summed:
    """Adds up the micro-batches; after an error `.grad` is what it was."""
    window, before, loss_dtype = Window(), {}, torch.float32
    if call.ranks is not None and is_wide(call.ranks.parameters, call.dtype):
        window.dtype = call.dtype
    parts = _parts(call, window, micro_batch)
    window.planned = len(parts)
    if call.fused and not call.sharded and len(parts) > 1:  # one alone adds nothing up, and is autograd's to the bit
        path = fused_path(in_ranks=call.ranks is not None, between_calls=True)
        window.fused = path and path.window()
    # It drops nothing by itself: an error inside loss_fn goes through the except below.
    owned = Ownership("bb.backward", lambda: None, in_grad=not call.sharded)
    try:
        for part in parts:
            loss, items = _loss(call, window, part)
            if call.ranks is not None:
                call.ranks.before(window, items, len(parts))
            parameters = window.parameters_of(loss)
            if call.ranks is not None and call.sharded:
                parameters = call.ranks.parameters
            owned.check()
            _set_aside(call, window, before, parameters, owned)
            with owned:
                window.backward(loss, items, parameters)
            owned.record()
            loss_dtype = torch.promote_types(loss_dtype, loss.dtype)
        owned.verify()
    except BaseException:
        _put_back(before)
        raise
    finally:
        owned.close()
    return _Summed(window, before, loss_dtype)


def _parts(call: _Call, window: Window, size: int) -> list[_Part]:
    """The micro-batches, of at most `size` examples or tokens."""
    if call.layout is not None:
        parts = [_Part(len(cut.indices), partial(call.layout.part, cut)) for cut in call.layout.cuts(size)]
        count = len(parts) if call.ranks is None else call.ranks.parts(window, call.length, len(parts))
        return parts + [_Part(0, parts[0].cut)] * (count - len(parts))
    slices = None if call.ranks is None else call.ranks.slices(window, call.length, size)
    if slices is None:
        slices = [(start, min(start + size, call.length)) for start in range(0, call.length, size)]
    return [_Part(stop - start, partial(_cut, call, start, max(stop, start + 1))) for start, stop in slices]


def _cut(call: _Call, start: int, stop: int) -> Any:
    """Examples start … stop - 1."""
    if call.cut is None:
        return batch_slice(call.batch, start, stop)
    return call.cut(call.batch, torch.arange(start, stop, device="cpu"))


def _loss(call: _Call, window: Window, part: _Part) -> tuple[Tensor, float | Tensor]:
    """A micro-batch's mean loss, and its items."""
    loss, items = errors.loss_and_items(call.loss_fn(part.cut()))
    loss = check_loss(loss)
    if not part.examples:
        return loss, loss.new_zeros(())
    if items is not None:
        return loss, check_items(items)
    if call.layout is not None:
        raise errors.items_with_tokens()
    if window.unit is None:
        window.unit = call.length
    return loss, part.examples


def _set_aside(
    call: _Call, window: Window, before: dict[Tensor, Tensor | None], parameters: list[Tensor], owned: Ownership
) -> None:
    """Empties the `.grad` of parameters that the window meets for the first time, and remembers what it held."""
    new = [p for p in parameters if p not in before]
    owned.add(new)
    for p in new:
        before[p], p.grad = p.grad, None
    if window.dtype is None and call.dtype is not None and is_wide(new, call.dtype):
        window.widen(before, call.dtype)
        owned.record(anew=True)


def _means(call: _Call, summed: _Summed) -> Tensor:
    """Makes means of the sums and returns the loss's; after an error `.grad` is what it was."""
    window, before, loss_dtype = summed
    try:
        totals = window.close() if call.ranks is None else call.ranks.mean(window, before)
        if not totals.micro_batches:
            errors.check_lengths(call.lengths)  # raises, for no rank has an example
        if not (math.isfinite(totals.items) and totals.items > 0):
            raise errors.items_not_counts(totals.items, f"{totals.micro_batches} micro-batches")
        if not math.isfinite(totals.loss):
            raise errors.loss_not_finite(totals.loss, f"{totals.micro_batches} micro-batches")
        scale_(window.gradients(before), totals.factor)
        for p in window.sums:
            if before[p] is None:  # rounded here, where a lack of memory can still be taken back
                window.sums[p] = window.sums[p].to(gradient_dtype(p))
        return window.loss.new_full((), totals.loss, dtype=torch.promote_types(loss_dtype, window.loss.dtype))
    except BaseException:
        _put_back(before)
        raise


def _put_back(before: dict[Tensor, Tensor | None]) -> None:
    for p, grad in before.items():
        p.grad = grad


@torch.no_grad()
def _add_to_grad(p: Tensor, before: Tensor | None, mean: Tensor | None) -> None:
    """`.grad` = what it held before + the window's mean, in place where autograd would add in place."""
    if before is None or mean is None:
        p.grad = before if mean is None else mean.to(gradient_dtype(p))
    elif before.is_sparse:
        p.grad = (before + mean).to(gradient_dtype(p))
    else:
        p.grad = before.add_(mean)
