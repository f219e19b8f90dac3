"""The memory that this process may still take, and whether an error means that there was too little."""

import os
import re
from pathlib import Path
from typing import NamedTuple

# What allocators say of a failed allocation where it has no exception type of its own: it arrives as a RuntimeError.
# Not CUDNN_STATUS_NOT_SUPPORTED or "unable to find an engine", which have other causes as well.
_FAILED_ALLOCATION = re.compile(
    r"""\b(?:CUDA|HIP|XPU|MPS\ backend)\ out\ of\ memory
    | \b(?:CUDA|HIP)\ error:\ out\ of\ memory
    | CUDA_ERROR_OUT_OF_MEMORY | hipErrorOutOfMemory | kIOGPUCommandBufferCallbackErrorOutOfMemory
    | (?:CU|HIP|ROC)[A-Z]+(?:_STATUS\w*)?_(?:ALLOC_FAILED|ALLOCATION_FAILED) | rocblas_status_memory_error
    | Invalid\ buffer\ size:\ [\d.]+                           # MPS: more than one buffer can hold
    | DefaultCPUAllocator:\ (?:can't\ allocate|not\ enough)\ memory
    | std::bad_alloc | \bbad\ allocation\b | \bCannot\ allocate\ memory\b
    | \bRESOURCE_EXHAUSTED\b | \bMemoryError\b
    | \bUnable\ to\ allocate\ .+\ for\ an\ array\ with\ shape    # NumPy's, where a wrapper changed the type
    """,
    re.VERBOSE,
)
# POSIX limits that TensorFlow and XLA report under the same code as memory.
_OTHER_LIMITS = re.compile(
    r"No space left on device|Too many open files|Too many links|[Qq]uota exceeded|message larger"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation: a `MemoryError`, or a `RuntimeError` with an allocator's own text.

    The frameworks' packages add the exception types that are their own.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and reports_failed_allocation(error)


def reports_failed_allocation(error: BaseException) -> bool:
    """Whether an error's text is what an allocator says, whatever its type is."""
    text = str(error)
    return _FAILED_ALLOCATION.search(text) is not None and not reports_other_limit(error)


def reports_other_limit(error: BaseException) -> bool:
    """Whether an error is about another resource that ran out, such as a disk or file descriptors."""
    return _OTHER_LIMITS.search(str(error)) is not None


class Memory(NamedTuple):
    """A device's memory, in bytes.

    Attributes:
        in_use: what this process holds now.
        free: what it may take beside that.
        limit: what sets the limit, in words: "the machine", "its cgroup", "ulimit -v", "ulimit -d", or a device's name.
    """

    in_use: int
    free: int
    limit: str


def memory(root: Path = Path("/")) -> Memory:
    """The machine's memory for this process: the least that any limit leaves.

    Counted are what the kernel calls available, the limits of the cgroups (both versions) that the process is in, page
    cache that would give way not counted as used, and `ulimit -v` and `-d`. Under torchrun the ranks on this machine
    get equal shares of the first two.

    Args:
        root: where `proc` and `sys` are.

    Raises:
        NotImplementedError: the system reports none of it (Windows).
    """
    status = _numbers(root / "proc/self/status")
    left = {}
    machine = _numbers(root / "proc/meminfo")
    if "MemAvailable" in machine:
        left["the machine"] = machine["MemAvailable"] << 10
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        # macOS tells no more than this without asking a program; the reserve must do for what others use.
        left["the machine"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    cgroup = _cgroup(root)
    if cgroup is not None:
        left["its cgroup"] = cgroup
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:  # they plan at the same time, and each sees what is free for all
        left = {f"{name}, shared by {ranks} ranks": size // ranks for name, size in left.items()}
    left |= _ulimits(status)
    if not left:
        raise NotImplementedError("This system does not say how much memory is free. Pass micro_batch as a number.")
    limit = min(left, key=lambda name: left[name])
    return Memory(status.get("VmRSS", 0) << 10, max(0, left[limit]), limit)


def _ulimits(status: dict[str, int]) -> dict[str, int]:
    """What the process's own limits leave; `status` is in KiB."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    limits = {"ulimit -v": (resource.RLIMIT_AS, "VmSize"), "ulimit -d": (resource.RLIMIT_DATA, "VmData")}
    left = {}
    for name, (limit, counted) in limits.items():
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and counted in status:
            left[name] = soft - (status[counted] << 10)
    return left


def _cgroup(root: Path) -> int | None:
    """What the tightest of the process's cgroups leaves, or None where none has a limit."""
    left = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = Path(path.lstrip("/"))
        # A parent's limit holds for its children. In a container the path may be the host's, and only the top is seen.
        for folder in (root / mount / part for part in (group, *group.parents)):
            bounds = [text for name in (limit, usage) for text in _lines(folder / name)]
            if len(bounds) == 2 and bounds[0] != "max":
                used = int(bounds[1]) - _numbers(folder / "memory.stat").get(cache, 0)
                left.append(int(bounds[0]) - used)
    return min(left, default=None)


def _numbers(path: Path) -> dict[str, int]:
    """`name: 123 kB` or `name 123` on each line, as numbers; other lines left out."""
    found = {}
    for line in _lines(path):
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdecimal():
            found[words[0]] = int(words[1])
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def format_bytes(size: float) -> str:
    """Bytes as a person reads them: `1.50 GiB`, `310 MiB`."""
    for unit, step in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size) >= step:
            value = size / step
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size:.0f} bytes"
