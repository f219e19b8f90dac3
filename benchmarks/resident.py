"""Peak memory of frameworks that keep no account on a CPU: what a process of its own holds more during one window.

Tensors are mapped one by one (`MALLOC_MMAP_THRESHOLD_`), so that what is freed goes back to the system and the process
holds what they hold; oneDNN, whose allocator gives nothing back, is left out. The window has run before, so that what
the framework makes once does not count; the model, the optimizer's state and the batch stand before it, and do not
either. A contender says in `run.correction` what to add in bytes: sums of gradients that stand between windows too,
less what of the batch's own data is made inside.
"""

import gc
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "TF_ENABLE_ONEDNN_OPTS": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}


def asked_of(script: str | Path, *arguments: object) -> dict[str, int]:
    """What `told` prints in a process of its own, which runs `script --peaks ARGUMENTS`: bytes by contender."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments), "--peaks"],
        env=clean | EXACT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    lines = [line.partition("\t") for line in done.stdout.splitlines() if "\t" in line]
    return {name: int(size) for size, _, name in lines}


def growth(script: str | Path, points: list[tuple[int, int]]) -> list[dict[str, int]]:
    """The same for some (width, micro-batches a window), two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda point: asked_of(script, *point), points))


def answer(windows: Callable[[int, int], dict[str, Callable[[], object]]]) -> None:
    """What a script does that `growth` asks."""
    width, n, *_ = sys.argv[1:]
    told(windows(int(width), int(n)), times=3 if int(n) <= 64 else 1)


def told(contenders: dict[str, Callable[[], object]], times: int = 5) -> None:
    """Measures each contender's window, the median of so many, and prints it for `asked_of`."""
    for name, run in contenders.items():
        run()
        print(f"{statistics.median_low(_once(run) for _ in range(times))}\t{name}", flush=True)


def _once(run: Callable[[], object]) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _status("VmRSS") - getattr(run, "correction", lambda: 0)()
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10
