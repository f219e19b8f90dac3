"""The micro-batch that fits: planned before a window, and lowered after an out-of-memory that came anyway."""

import functools
import logging
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bigbatch import errors
from bigbatch.engines.torch_estimate import Rehearsals, State, device_memory, is_out_of_memory, release, reserve
from bigbatch.plan import Plan, budget, choose, halved, not_even_one, timed
from bigbatch.torch.batch import cut, is_text, leaves
from bigbatch.torch.checks import check_dtype, check_flag, check_items, check_loss
from bigbatch.torch.split import parameters_of

Result = TypeVar("Result")

# One line a choice, by logging and as a warning, which is what is seen where logging was never set up, on stderr as
# PyTorch's own: the choice decides how fast training is, and was made on the user's behalf.
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

    Each size is rehearsed on fake tensors: `loss_fn` is called, forward and backward, on shapes without contents, which
    takes milliseconds and allocates nothing. Gradients, buffers and random states stay as they are. A `loss_fn` that
    asks for values on the way (`.item()`, data-dependent control flow) is run on 4 and on 8 examples instead, and the
    rest is a straight line through the two; the plan says so::

        plan = bb.plan(loss_fn, (x, y), memory="8GiB")
        plan.show()
        loss = bb.backward(loss_fn, (x, y), micro_batch=plan.micro_batch)

    Args:
        loss_fn: as `backward` takes it. It is called for each size that is looked at, and must keep none of its
            tensors beyond the call.
        batch: as `backward` takes it.
        memory: what everything held together may reach: a size ("8GiB", or bytes as an integer); a fraction
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
    return _plan(_rehearsals(loss_fn, batch, length, dtype), memory, time, first=True)


def fitting(
    window: Callable[[int], Result], loss_fn: Callable[[Any], Any], batch: Any, length: int, dtype: Any
) -> Result:
    """Runs `window(micro_batch)` with the micro-batch that fits.

    After an out-of-memory the whole window is done again with micro-batches of half the size, from the gradients,
    the buffers and the random states that were there before it: what comes out is, bit for bit, what the smaller
    micro-batch would have made of it in the first place. It goes on with the smaller one.

    Args:
        window: has no effect where it raises, but for buffers and random states.
        loss_fn: as the door takes it.
        batch: as the door takes it.
        length: of the batch.
        dtype: as the door takes it.

    Raises:
        Whatever `window` raises that is no out-of-memory; an out-of-memory of micro-batches of 1, with a note.
    """
    choice = _choice(loss_fn, batch, length, dtype)
    while True:
        kept = State(choice.device, choice.written)
        try:
            return window(choice.micro_batch)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if choice.micro_batch == 1:
                error.add_note(not_even_one(choice.plan))
                raise
        # Only here, outside the except, are the failed frames gone and with them the tensors that they held.
        kept.give_back()
        choice.lower()


def _rehearsals(loss_fn: Callable[[Any], Any], batch: Any, length: int, dtype: torch.dtype | None) -> Rehearsals:
    def checked(micro_batch: Any) -> tuple[Tensor, Any]:
        """The loss, and all that is there during the backward beside it."""
        result = loss_fn(micro_batch)
        loss, items = errors.loss_and_items(result)
        if items is not None:
            check_items(items)
        return check_loss(loss), result

    return Rehearsals(checked, lambda size: cut(batch, 0, size), parameters_of, length, dtype)


def _plan(rehearsals: Rehearsals, memory: Any, timing: bool, first: bool) -> Plan:
    known = rehearsals.known
    if rehearsals.length not in known:
        known[rehearsals.length] = rehearsals.needs(rehearsals.length)  # tells the device as well
    keep = 2 * rehearsals.parameters if first else 0  # as Adam has it
    allowed = budget(memory, device_memory(rehearsals.device), keep=keep, reserve=reserve(rehearsals.device))
    chosen = choose(
        rehearsals.needs,
        rehearsals.length,
        allowed,
        rehearsals.how,
        notes=rehearsals.notes(),
        given=memory,
        known=known,
    )
    return timed(chosen, rehearsals.needs, rehearsals.seconds) if timing else chosen


class _Choice:
    """What is remembered for one loss function and one shape of batch."""

    def __init__(self, rehearsals: Rehearsals, made: Plan):
        self.plan = made
        self.known = rehearsals.known
        self.written = rehearsals.written
        self.device = rehearsals.device
        self.micro_batch = made.micro_batch

    def lower(self) -> None:
        """To half the size: twice as many micro-batches."""
        failed = self.micro_batch
        self.micro_batch = halved(self.plan.batch, failed)
        logger.warning(
            'micro_batch="auto": out of memory at %s; the window is done again with %s.',
            f"{failed:,}",
            f"{self.micro_batch:,}",
        )
        release(self.device)


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
    rehearsals = _rehearsals(loss_fn, batch, length, dtype)
    choice = choices[key] = _Choice(rehearsals, _plan(rehearsals, None, False, first=not choices))
    logger.warning('micro_batch="auto": %s in %.1f s.', choice.plan, time.perf_counter() - started)
    return choice


def _code(loss_fn: Any) -> tuple[Any, list[Any]]:
    """What stays the same when a lambda is written anew each time, and the objects that it works on."""
    if isinstance(loss_fn, functools.partial):
        code, bound = _code(loss_fn.func)
        return code, [*bound, *loss_fn.args, *loss_fn.keywords.values()]
    if isinstance(loss_fn, types.MethodType):
        code, bound = _code(loss_fn.__func__)
        return code, [loss_fn.__self__, *bound]
    if isinstance(loss_fn, types.FunctionType):
        return loss_fn.__code__, list(_named(loss_fn))
    return type(loss_fn), [loss_fn]


def _named(function: types.FunctionType) -> Iterator[Any]:
    """What a function names: what it closes over, and globals."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from (function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__)


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
