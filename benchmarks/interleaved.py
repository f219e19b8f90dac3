"""Times contenders against each other in one process, in turn, so that a busy machine slows them all alike."""

import gc
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Timing:
    """Seconds a window: the median and the quartiles over the repetitions."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return first, third


def measure(contenders: Mapping[str, Callable[[], None]], repetitions: int, warm_up: int = 3) -> dict[str, Timing]:
    """Runs each contender once a round, in an order drawn anew each round.

    A contender makes one whole window and waits until the device has done it.
    """
    for _ in range(warm_up):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    draw = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repetitions):
            draw.shuffle(order)
            for name in order:
                started = time.perf_counter()
                contenders[name]()
                seconds[name].append(time.perf_counter() - started)
    finally:
        gc.enable()
    return {name: Timing(several) for name, several in seconds.items()}


def ratio(timings: Mapping[str, Timing], name: str, to: str) -> float:
    """The median over rounds of one contender's time over another's in the same round.

    Both numbers of a pair saw the same neighbours on the machine, which two medians did not.
    """
    pairs = zip(timings[name].seconds, timings[to].seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(timings: Mapping[str, Timing], against: list[str]) -> str:
    """A Markdown table: medians, quartiles, and ratios to each of `against`."""
    lines = [
        "| | ms a window (quartiles) | " + " | ".join(f"× {name}" for name in against) + " |",
        "| --- | ---: |" + " ---: |" * len(against),
    ]
    for name, timing in timings.items():
        low, high = timing.quartiles
        ratios = " | ".join(f"{ratio(timings, name, to):.2f}" for to in against)
        lines.append(f"| {name} | {timing.median * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f}) | {ratios} |")
    return "\n".join(lines)


def circumstances(*packages: str) -> str:
    """Hardware, versions and commit, for the head of a page of results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    python = platform.python_version()
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} × {cpu}, Python {python}, {versions}, commit {commit}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
