"""What a process grows by while something runs, as the kernel counts it: for scripts with a process of their own."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any


def status(name: str) -> int:
    """A number from the kernel's table of this process, in bytes: VmRSS is what it has now, VmHWM the most it had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def growth(run: Callable[[], Any]) -> int:
    """The bytes that the process grew by while `run()` ran, at its peak."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = status("VmRSS")
    run()
    return status("VmHWM") - before
