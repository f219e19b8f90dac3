"""The micro-batch that fits: planned before a window, and halved after an out-of-memory that came all the same."""

import functools
import logging
import time
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bigbatch import errors
from bigbatch.engines.captures import closed_over, named_globals
from bigbatch.engines.torch_estimate import DryRuns, State, device_memory, is_out_of_memory, release, reserve
from bigbatch.engines.torch_leaves import parameters_of
from bigbatch.lengths import Cut
from bigbatch.plan import Choice, Plan, budget, choose, fitting, log_choice, timed
from bigbatch.torch.batch import cut, is_text, leaves
from bigbatch.torch.checks import check_dtype, check_flag, check_items, check_loss
from bigbatch.torch.lengths import Layout

Result = TypeVar("Result")

# Logs one line a choice, as a warning: it decides how fast training is, the user did not make it, and warnings are
# what logging prints where nobody has configured it.
logger = logging.getLogger("bigbatch.torch")


def plan(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    memory: str | float | None = None,
    time: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> Plan:
    """The largest micro-batch that fits, and why, without running out of memory to find out.

    Each size has a dry run on fake tensors: `loss_fn` is called, forward and backward, on shapes without contents. That
    takes milliseconds and allocates nothing. Gradients, buffers and random states stay as they are. A `loss_fn` that
    asks for values on the way (`.item()`, data-dependent control flow) is run on 4 and on 8 examples instead, and the
    rest is a straight line through the two; the plan's `how` states that::

        plan = bb.plan(loss_fn, (x, y), memory="8GiB")
        plan.show()
        loss = bb.backward(loss_fn, (x, y), micro_batch=plan.micro_batch)

    Args:
        loss_fn: as `backward` takes it. It is called for each size that is looked at, and must keep none of its
            tensors beyond the call.
        batch: as `backward` takes it.
        memory: what all that is in use together may reach: a size ("8GiB", or bytes as an integer); a fraction
            (0 < float ≤ 1) of what is free on the loss's device; by default what is free less a reserve, of a tenth on
            a device and of 45 % on a CPU, where the heap keeps holes (docs/memory.md). On a CPU free is what the
            machine, the process's cgroups and its ulimits leave.
        time: also times the largest size that fits, its half, its quarter, …, each run three times for real, and
            takes the fastest.
        dtype: as `backward` takes it.

    Returns:
        The `bigbatch.plan.Plan`: `micro_batch`, `candidates`, `budget`, `show()` and `save("plan.png")`.

    Raises:
        TypeError, ValueError: the batch or `memory` is not as described, or no example fits `memory`.
        MemoryError: no example fits what is free.

    Twice the parameters are kept free for the state that an optimizer makes at its first step.
    """
    check_flag("time", time)
    check_dtype(dtype)
    length = errors.check_lengths([(where, len(leaf)) for where, leaf in leaves(batch, "batch")])
    return _plan(_dry_runs(loss_fn, batch, length, dtype), memory, time, first=True)


def auto(run: Callable[[int], Result], loss_fn: Callable[[Any], Any], batch: Any, length: int, dtype: Any) -> Result:
    """Runs `run(micro_batch)` with the micro-batch that fits.

    After an out-of-memory the whole window is run again with micro-batches of half the size, from the gradients, the
    buffers and the random states that were there before it. The result is, bit for bit, what the smaller micro-batch
    would have given in the first place. Later windows begin with the smaller one.

    Args:
        run: makes a window; where it raises it has no effect, but on buffers and random states.
        loss_fn: as the split API takes it.
        batch: as the split API takes it.
        length: of the batch.
        dtype: as the split API takes it.

    Raises:
        Exception: as `bigbatch.plan.fitting`.
    """
    choice = _choice(loss_fn, batch, length, dtype)
    return fitting(run, choice, length, is_out_of_memory, logger, _saving(choice))


def auto_tokens(run: Callable[[int], Result], loss_fn: Callable[[Any], Any], layout: Layout, dtype: Any) -> Result:
    """As `auto`, of `run(most)`: the most rows × longest that fit.

    Two corners are planned: rows as long as the batch, and as many rows as that makes of the shortest example. Between
    them a micro-batch of as many tokens takes no more: what a loss keeps grows with the rows, with the tokens, or
    faster than these with the length.
    """
    examples, shortest = len(layout.lengths), min(layout.lengths)
    choice = _choice(loss_fn, layout.batch, examples, dtype)
    most = choice.size(examples) * layout.longest
    rows = min(examples, most // shortest)
    short = _choice(loss_fn, layout.part(Cut(list(range(examples)), shortest)), examples, dtype)
    if short.micro_batch < rows:
        most = min(most, short.micro_batch * shortest)
    key = layout.longest, shortest
    tokens = choice.tokens.setdefault(key, _TokenChoice(choice.plan, most))
    return fitting(run, tokens, examples * layout.longest, is_out_of_memory, logger, _saving(choice))


def _saving(choice: "_Choice") -> Callable[[], Callable[[], None]]:
    """For `fitting`: what a window writes to beside its gradients."""

    def save() -> Callable[[], None]:
        state = State(choice.device, choice.written)

        def restore() -> None:
            state.restore()
            release(choice.device)

        return restore

    return save


def _dry_runs(loss_fn: Callable[[Any], Any], batch: Any, length: int, dtype: torch.dtype | None) -> DryRuns:
    def checked(micro_batch: Any) -> tuple[Tensor, Any]:
        """The loss, and all that is there during the backward beside it."""
        result = loss_fn(micro_batch)
        loss, items = errors.loss_and_items(result)
        if items is not None:
            check_items(items)
        return check_loss(loss), result

    return DryRuns(checked, lambda size: cut(batch, 0, size), parameters_of, length, dtype)


def _plan(dry_runs: DryRuns, memory: Any, timing: bool, first: bool) -> Plan:
    known = dry_runs.known
    if dry_runs.length not in known:
        known[dry_runs.length] = dry_runs.needs(dry_runs.length)  # detects the device as well
    keep = 2 * dry_runs.parameters if first else 0  # as Adam has it
    allowed = budget(memory, device_memory(dry_runs.device), keep=keep, reserve=reserve(dry_runs.device))
    chosen = choose(
        dry_runs.needs, dry_runs.length, allowed, dry_runs.how, notes=dry_runs.notes(), given=memory, known=known
    )
    return timed(chosen, dry_runs.needs, dry_runs.seconds) if timing else chosen


@dataclass
class _Choice(Choice):
    """What is remembered for one loss function and one shape of batch."""

    device: torch.device
    written: list[weakref.ref[Tensor]]
    tokens: "dict[Any, _TokenChoice]" = field(default_factory=dict)  # by the longest and the shortest example


class _TokenChoice(Choice):
    """The most tokens of a micro-batch, in place of its examples."""

    def size(self, length: int) -> int:
        return self.micro_batch


# Plans, for as long as the code of the loss function is there. A cache: training without it is the same but slower.
_remembered: weakref.WeakKeyDictionary[Any, dict[Any, _Choice]] = weakref.WeakKeyDictionary()


def _choice(loss_fn: Callable[[Any], Any], batch: Any, length: int, dtype: Any) -> _Choice:
    code, bound = _code(loss_fn)
    key = (
        tuple(
            (where, len(leaf)) if is_text(leaf) else (where, leaf.shape, leaf.dtype, leaf.device)
            for where, leaf in leaves(batch, "batch")
        ),
        dtype,
        tuple(_identity(value) for value in bound),
    )
    choices = _remembered.setdefault(code, {})
    choice = choices.get(key)
    if choice is not None and all(ref() is not None for ref in choice.written):
        return choice
    started = time.perf_counter()
    dry_runs = _dry_runs(loss_fn, batch, length, dtype)
    planned = _plan(dry_runs, None, False, first=not choices)
    choice = choices[key] = _Choice(planned, planned.micro_batch, dry_runs.device, dry_runs.written)
    log_choice(logger, planned, started)
    return choice


def _code(loss_fn: Any) -> tuple[Any, list[Any]]:
    """The code, which is the same for a lambda that is made again in each call, and the objects that it works on."""
    if isinstance(loss_fn, functools.partial):
        code, bound = _code(loss_fn.func)
        return code, [*bound, *loss_fn.args, *loss_fn.keywords.values()]
    if isinstance(loss_fn, types.MethodType):
        code, bound = _code(loss_fn.__func__)
        return code, [loss_fn.__self__, *bound]
    if isinstance(loss_fn, types.FunctionType):
        return loss_fn.__code__, [*closed_over(loss_fn), *named_globals(loss_fn)]
    return type(loss_fn), [loss_fn]


def _identity(value: Any) -> Any:
    """What tells apart two objects that a loss function works on, and the states of one that change what it needs."""
    if isinstance(value, nn.Module):
        return weakref.ref(value), value.training, sum(p.requires_grad for p in value.parameters())
    if isinstance(value, types.ModuleType | type | types.BuiltinFunctionType):
        return None
    try:
        reference = weakref.ref(value)
        hash(reference)
    except TypeError:  # a number, a string, an array of NumPy's: no model
        return None
    return reference
