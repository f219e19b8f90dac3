"""What a compiled program needs, by the compiler's own account, and what the device has."""

from typing import Any

import jax

from bigbatch import host

# Each prediction is a compilation. Whatever takes nine tenths of the room will do.
TRIES, ENOUGH = 3, 0.9


def needs_of(program: Any) -> int:
    """Bytes that a compiled program takes beside its arguments, which are there already.

    Raises:
        NotImplementedError: the device's compiler does not say.
    """
    used = program.memory_analysis()
    if used is None:
        raise NotImplementedError(
            "This device's compiler does not say what a program needs. Pass micro_batch as a number."
        )
    # peak_memory_in_bytes leaves the temporaries out on a CPU.
    return used.output_size_in_bytes + used.temp_size_in_bytes - used.alias_size_in_bytes


def device_memory() -> host.Memory:
    """Of the default device: a CPU is the machine's."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return host.memory()
    held = stats["bytes_in_use"]
    return host.Memory(held, stats["bytes_limit"] - held, str(device))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a program ended because there was no memory left."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
