"""What a compiled program needs, by the compiler's memory analysis, and what the device has."""

import math
from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from bigbatch import host

# Each prediction is a compilation. A micro-batch that takes nine tenths of the headroom will do.
TRIES, ENOUGH = 3, 0.9


def needs_of(traced: Any) -> int:
    """Bytes that a program takes beside its arguments, which are in memory already. It is compiled to find out.

    Args:
        traced: as `jax.jit(…).trace` returns it.

    Raises:
        NotImplementedError: the device's compiler has no memory analysis.
    """
    used = traced.lower().compile().memory_analysis()
    if used is None:
        raise NotImplementedError(
            "This device's compiler does not say what a program needs. Pass micro_batch as a number."
        )
    # peak_memory_in_bytes leaves the temporaries out on a CPU; tests/jax/test_private.py.
    needs = used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes
    return needs + (_inside_convolutions(traced.jaxpr.jaxpr) if jax.default_backend() == "cpu" else 0)


def bytes_of(arrays: Any) -> int:
    """The bytes of all arrays, or their shapes, in a pytree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays) if hasattr(x, "dtype"))


def _inside_convolutions(program: Any) -> int:
    """What a CPU's convolution allocates when it runs, which the analysis leaves out: a copy of all that it reads."""
    most = 0
    for equation in program.eqns:
        if equation.primitive.name == "conv_general_dilated":
            shapes: Any = [v.aval for v in equation.invars]
            most = max(most, sum(shape.size * shape.dtype.itemsize for shape in shapes))
        most = max([most, *map(_inside_convolutions, _nested(equation.params))])
    return most


def _nested(params: dict[str, Any]) -> Iterator[Any]:
    """The programs inside an equation. `jax.extend.core.jaxprs_in_params` does the same from JAX 0.10 on."""
    for value in params.values():
        for v in value if isinstance(value, tuple) else (value,):
            if isinstance(v, Jaxpr | ClosedJaxpr):
                yield v.jaxpr if isinstance(v, ClosedJaxpr) else v


def device_memory() -> host.Memory:
    """The default device's memory; a CPU's is the machine's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return host.memory()
    in_use = stats["bytes_in_use"]
    return host.Memory(in_use, stats["bytes_limit"] - in_use, str(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a program ended because there was no memory left.

    JAX raises a `RuntimeError` where the program is called, and a `ValueError` of the same text where
    `block_until_ready` waits for several of its results; tests/jax/test_private.py.
    """
    while_waiting = isinstance(error, ValueError) and "RESOURCE_EXHAUSTED" in str(error)
    return while_waiting or host.is_out_of_memory(error)
