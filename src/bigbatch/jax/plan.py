"""The micro-batch that fits, by the compiler's memory analysis of a window."""

import dataclasses
import functools
import logging
import math
import sys
import time as clock
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bigbatch.engines.jax_estimate import ENOUGH, TRIES, bytes_of, device_memory, is_out_of_memory, needs_of
from bigbatch.jax.distributed import are_bound
from bigbatch.jax.window import Options, value_and_grad
from bigbatch.plan import Budget, Choice, Plan, budget, choose, fitting, log_choice, timed

# One line a choice, as a warning: those are seen where logging was never set up. The choice decides how fast training
# is, and was made on the user's behalf.
logger = logging.getLogger("bigbatch.jax")


def plan(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    has_items: bool = False,
    memory: str | float | None = None,
    time: bool = False,
    in_axes: Sequence[Any] = (None, 0),
    aux: Any = None,
    dtype: Any = jnp.float32,
    axis_name: str | Sequence[str] = (),
) -> Callable[..., Plan]:
    """A function of the micro-batch that fits, and why, without running out of memory to find out.

    It is called with the arguments of `value_and_grad`'s function, or with `jax.ShapeDtypeStruct`s in place of arrays.
    Each size is compiled, and the compiler's memory analysis tells what the program takes beside its arguments; nothing
    is run. A few compilations are enough: the search ends at a micro-batch that fills nine tenths of the headroom::

        plan = bb.plan(loss_fn, memory="8GiB")(params, batch)
        plan.show()
        step = bb.value_and_grad(loss_fn, micro_batch=plan.micro_batch)

    Args:
        loss_fn: as `value_and_grad` takes it.
        argnums: as `value_and_grad` takes it.
        has_aux: as `value_and_grad` takes it.
        has_items: as `value_and_grad` takes it.
        memory: what everything held together may reach: a size ("8GiB", or bytes as an integer); a fraction
            (0 < float ≤ 1) of what is free; by default what is free less a tenth. On a CPU free is what the machine,
            the process's cgroups and its ulimits leave.
        time: also times the whole batch with the largest size that fits, its half, its quarter, …, and takes the
            fastest. Needs arrays.
        in_axes: as `value_and_grad` takes it.
        aux: as `value_and_grad` takes it.
        dtype: as `value_and_grad` takes it.
        axis_name: as `value_and_grad` takes it.

    Returns:
        A function that returns a `bigbatch.plan.Plan`: `micro_batch`, `candidates`, `budget`, `show()` and
        `save("plan.png")`.

    Raises:
        TypeError, ValueError: when called: an argument is not as described, or no example fits `memory`.
        MemoryError: when called: no example fits what is free.

    Twice the parameters are kept free for the optimizer's step.
    """
    options = Options(loss_fn, argnums, has_aux, has_items, in_axes, aux, dtype, axis_name).checked()

    @functools.wraps(loss_fn)
    def planned(*args: Any, **kwargs: Any) -> Plan:
        call = _Call(options, args, kwargs)
        return _of_all_devices(call.plan(memory, time), call.devices)

    return planned


def with_planned_micro_batch(options: Options) -> Callable[..., Any]:
    """`value_and_grad` with the micro-batch that fits, planned once for each shape of the arguments.

    Called with arrays, and not inside `jax.jit`, it also survives an out-of-memory: the call is made again with
    micro-batches of half the size, and later calls use that size. Nothing has to be restored, for nothing was changed.
    """
    choices: dict[Any, Choice] = {}

    @functools.wraps(options.loss_fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        call = _Call(options, args, kwargs)
        key = call.devices, call.tree, *(_abstract(leaf) if _is_array(leaf) else repr(leaf) for leaf in call.leaves)
        if key not in choices:
            started = clock.perf_counter()
            found = call.plan(None, False)
            choices[key] = Choice(found, found.micro_batch)
            chosen = _of_all_devices(found, call.devices)
            log_choice(logger, chosen, started)
        choice = choices[key]

        def run(size: int) -> Any:
            return value_and_grad(options, size * call.devices)(*args, **kwargs)

        if any(isinstance(leaf, Tracer) for leaf in call.leaves):
            return run(choice.micro_batch)
        # Without waiting, the error would come later, in the user's code.
        return fitting(
            lambda size: jax.block_until_ready(run(size)), choice, choice.plan.batch, is_out_of_memory, logger
        )

    return wrapped


class _Call:
    """The programs for one call's arguments, one for each size of micro-batch. Sizes are those of one device."""

    def __init__(self, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]):
        # Inside shard_map an axis has no name for a program of its own, and what is reduced at the end takes nothing
        # beside the gradients. On a mesh in scope each device takes the same part of a micro-batch.
        names = () if are_bound(options.names) else options.names
        shape = jax.sharding.get_abstract_mesh().shape
        self.devices = math.prod(shape.get(name, 1) for name in names)
        self.options = options._replace(names=names)
        self.args, self.kwargs = args, kwargs
        self.leaves, self.tree = jax.tree.flatten((args, kwargs))
        self.arrays = [_abstract(leaf) for leaf in self.leaves if _is_array(leaf)]

    def plan(self, memory: Any, time: bool) -> Plan:
        """As the public `plan`, for one device."""
        length = self.length() // self.devices
        known: dict[int, int] = {}
        found = choose(
            self.needs,
            length,
            self.budget(memory),
            lambda: f"by the compiler's memory analysis of {len(known)} programs",
            tries=TRIES,
            enough=ENOUGH,
            given=memory,
            known=known,
        )
        return timed(found, self.needs, lambda size: self.seconds(size) * size / length) if time else found

    def budget(self, memory: Any) -> Budget:
        """What a window may take beside the state of an optimizer."""
        params = [self.args[k] for k in self.options.numbers]
        # Adam's, even where it exists already: a step that does not donate it makes a new one.
        keep = 2 * bytes_of(params)
        return budget(memory, device_memory(), keep=keep)

    def length(self) -> int:
        """Examples in the batch."""
        lengths: list[int] = []

        def note(*given: Any) -> None:
            batch = self.options.batch(*self.nested(given), sys.maxsize)
            batch.check_parameters(self.options.numbers)
            lengths.append(batch.length)

        jax.eval_shape(note, *self.arrays)
        return lengths[0]

    def needs(self, size: int) -> int:
        """Bytes that a window of this micro-batch takes."""
        run = value_and_grad(self.options, size * self.devices)

        def call(*given: Any) -> Any:
            args, kwargs = self.nested(given)
            return run(*args, **kwargs)

        return needs_of(jax.jit(call).trace(*self.arrays))

    def seconds(self, size: int) -> float:
        """Of a window: the least of three, after a first one."""
        run = jax.jit(value_and_grad(self.options, size * self.devices))
        jax.block_until_ready(run(*self.args, **self.kwargs))
        least = math.inf
        for _ in range(3):
            started = clock.perf_counter()
            jax.block_until_ready(run(*self.args, **self.kwargs))
            least = min(least, clock.perf_counter() - started)
        return least

    def nested(self, arrays: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's (args, kwargs) with these in place of its arrays."""
        following = iter(arrays)
        return self.tree.unflatten(next(following) if _is_array(leaf) else leaf for leaf in self.leaves)


def _of_all_devices(plan: Plan, devices: int) -> Plan:
    """A plan for one device, with the sizes of all of them together."""
    candidates = tuple(c._replace(micro_batch=c.micro_batch * devices) for c in plan.candidates)
    return dataclasses.replace(
        plan, micro_batch=plan.micro_batch * devices, batch=plan.batch * devices, candidates=candidates
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
