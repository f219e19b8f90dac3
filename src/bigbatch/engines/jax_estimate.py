"""What a compiled program needs, by the compiler's own account, and what the device has."""

from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from bigbatch import host

# Each prediction is a compilation. Whatever takes nine tenths of the room will do.
TRIES, ENOUGH = 3, 0.9


def needs_of(traced: Any) -> int:
    """Bytes that a program, as `jax.jit(…).trace` makes it, takes beside its arguments, which are there already.

    It is compiled for that.

    Raises:
        NotImplementedError: the device's compiler does not say.
    """
    used = traced.lower().compile().memory_analysis()
    if used is None:
        raise NotImplementedError(
            "This device's compiler does not say what a program needs. Pass micro_batch as a number."
        )
    # peak_memory_in_bytes leaves the temporaries out on a CPU.
    needs = used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes
    return needs + (_inside_convolutions(traced.jaxpr.jaxpr) if jax.default_backend() == "cpu" else 0)


def _inside_convolutions(program: Any) -> int:
    """What a CPU's convolutions take inside, which the compiler leaves out: a copy of all that one of them reads."""
    most = 0
    for equation in program.eqns:
        if equation.primitive.name == "conv_general_dilated":
            shapes: Any = [v.aval for v in equation.invars]
            most = max(most, sum(shape.size * shape.dtype.itemsize for shape in shapes))
        most = max([most, *map(_inside_convolutions, jaxprs_in_params(equation.params))])
    return most


def device_memory() -> host.Memory:
    """Of the default device: a CPU is the machine's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return host.memory()
    held = stats["bytes_in_use"]
    return host.Memory(held, stats["bytes_limit"] - held, str(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a program ended because there was no memory left.

    JAX raises the program's own error where it is called, and a `ValueError` of the same text where several of its
    results are waited for.
    """
    waited_for = isinstance(error, ValueError) and "RESOURCE_EXHAUSTED" in str(error)
    return waited_for or host.is_out_of_memory(error)
