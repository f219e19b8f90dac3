"""The micro-batch that fits, by the compiler's own account of what a window needs."""

import dataclasses
import functools
import logging
import math
import sys
import time as clock
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bigbatch.engines.jax_estimate import ENOUGH, TRIES, device_memory, is_out_of_memory, needs_of
from bigbatch.jax.batch import Batch
from bigbatch.jax.distributed import are_bound
from bigbatch.jax.split import value_and_grad
from bigbatch.plan import Plan, budget, choose, halved, not_even_one, timed

# One line a choice, by logging and as a warning, which is what is seen where logging was never set up: the choice
# decides how fast training is, and was made on the user's behalf.
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
    Each size is compiled, and the compiler says what the program takes beside its arguments; nothing is run. That is
    exact, and takes a few compilations, so it is content with a micro-batch that fills nine tenths of the room::

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
    options = {"has_items": has_items, "in_axes": in_axes, "aux": aux, "dtype": dtype}
    door = _Door(loss_fn, argnums, has_aux, False, options, _names(axis_name))
    door.at(1)  # refuses what is wrong with the options

    @functools.wraps(loss_fn)
    def planned(*args: Any, **kwargs: Any) -> Plan:
        return _plan(door, args, kwargs, memory, time)

    return planned


def fitting(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    holomorphic: bool,
    *,
    axis_name: str | Sequence[str],
    **options: Any,
) -> Callable[..., Any]:
    """`value_and_grad` with the micro-batch that fits, planned once for each shape of the arguments.

    Called with arrays, and not inside `jax.jit`, it also survives an out-of-memory: the call is made again with
    micro-batches of half the size, and goes on with those. Nothing has to be taken back, for nothing was changed.
    """
    door = _Door(loss_fn, argnums, has_aux, holomorphic, options, _names(axis_name))
    door.at(1)  # refuses what is wrong with the options
    plans: dict[Any, Plan] = {}
    sizes: dict[Any, int] = {}

    @functools.wraps(loss_fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs))
        key = treedef, *(_abstract(leaf) if _is_array(leaf) else repr(leaf) for leaf in leaves)
        if key not in plans:
            started = clock.perf_counter()
            plans[key] = _plan(door, args, kwargs, None, False)
            sizes[key] = plans[key].micro_batch
            logger.warning('micro_batch="auto": %s in %.1f s.', plans[key], clock.perf_counter() - started)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return door.at(sizes[key])(*args, **kwargs)
        while True:
            try:
                # An error comes when the result is waited for, and later it would be the user's.
                return jax.block_until_ready(door.at(sizes[key])(*args, **kwargs))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if sizes[key] == 1:
                    error.add_note(not_even_one(plans[key]))
                    raise
            # Here, outside the except, the failed frames are gone and with them the arrays that they held.
            failed = sizes[key]
            sizes[key] = halved(plans[key].batch, failed)
            logger.warning(
                'micro_batch="auto": out of memory at %s; done again with %s.', f"{failed:,}", f"{sizes[key]:,}"
            )

    return wrapped


class _Door(NamedTuple):
    """The arguments of `value_and_grad` but for the micro-batch."""

    loss_fn: Callable[..., Any]
    argnums: int | Sequence[int]
    has_aux: bool
    holomorphic: bool
    options: dict[str, Any]
    names: tuple[str, ...]

    def at(self, micro_batch: int, names: tuple[str, ...] | None = None) -> Callable[..., Any]:
        names = self.names if names is None else names
        given = {**self.options, "axis_name": names, "micro_batch": micro_batch}
        return value_and_grad(self.loss_fn, self.argnums, self.has_aux, self.holomorphic, **given)


def _names(axis_name: str | Sequence[str]) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _plan(door: _Door, args: tuple[Any, ...], kwargs: dict[str, Any], memory: Any, time: bool) -> Plan:
    # Inside shard_map an axis has no name for a program of its own, and what is reduced at the end takes nothing beside
    # the gradients. On a mesh in scope a micro-batch is all devices' together, each with the same part of it.
    names = () if are_bound(door.names) else door.names
    shape = jax.sharding.get_abstract_mesh().shape
    unit = math.prod(shape.get(name, 1) for name in names)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = [_abstract(leaf) for leaf in leaves if _is_array(leaf)]
    known: dict[int, int] = {}

    def nested(given: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        following = iter(given)
        return treedef.unflatten(next(following) if _is_array(leaf) else leaf for leaf in leaves)

    def count(*given: Any) -> int:
        batch = Batch(door.loss_fn, *nested(given), door.options["in_axes"], sys.maxsize)
        batch.check_parameters((door.argnums,) if isinstance(door.argnums, int) else door.argnums)
        return batch.length

    length = _constant(count, arrays) // unit

    def needs(size: int) -> int:
        run = door.at(size * unit, names)

        def call(*given: Any) -> Any:
            args, kwargs = nested(given)
            return run(*args, **kwargs)

        return needs_of(jax.jit(call).trace(*arrays))

    def seconds(size: int) -> float:
        run = jax.jit(door.at(size * unit))
        jax.block_until_ready(run(*args, **kwargs))
        least = math.inf
        for _ in range(3):
            started = clock.perf_counter()
            jax.block_until_ready(run(*args, **kwargs))
            least = min(least, clock.perf_counter() - started)
        return least * size / length

    params = [args[k] for k in ((door.argnums,) if isinstance(door.argnums, int) else door.argnums)]
    # As Adam has it: even where its state is there already, a step that does not donate it makes it anew.
    keep = 2 * sum(math.prod(p.shape) * p.dtype.itemsize for p in jax.tree.leaves(params) if hasattr(p, "dtype"))
    allowed = budget(memory, device_memory(), keep=keep)
    found = choose(
        needs,
        length,
        allowed,
        lambda: f"by the compiler's account of {len(known)} programs",
        tries=TRIES,
        enough=ENOUGH,
        given=memory,
        known=known,
    )
    if time:
        found = timed(found, needs, seconds)
    return found if unit == 1 else _of_all_devices(found, unit)


def _constant(function: Callable[..., int], arrays: list[jax.ShapeDtypeStruct]) -> int:
    """What a function of shapes returns."""
    found: list[int] = []
    jax.eval_shape(lambda *given: found.append(function(*given)), *arrays)
    return found[0]


def _of_all_devices(plan: Plan, unit: int) -> Plan:
    candidates = tuple(c._replace(micro_batch=c.micro_batch * unit) for c in plan.candidates)
    return dataclasses.replace(
        plan, micro_batch=plan.micro_batch * unit, batch=plan.batch * unit, candidates=candidates
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
