"""Times contenders against each other in one process, in turn, so that a busy machine slows them all alike."""

import gc
import os
import platform
import random
import re
import statistics
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# What is wanted of the split door over the floor at most, in every framework, by job.
OVER_THE_FLOOR = {"transformer": 1.05, "convolutional": 1.05}


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


def measure(
    contenders: Mapping[str, Callable[[], float | None]], repetitions: int, warm_up: int = 3
) -> dict[str, Timing]:
    """Runs each contender once a round, in an order drawn anew each round.

    A contender makes one whole window and waits until the device has done it. One that keeps the time itself returns
    the seconds.
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
                own = contenders[name]()
                seconds[name].append(time.perf_counter() - started if own is None else own)
    finally:
        gc.enable()
    return {name: Timing(several) for name, several in seconds.items()}


def rounds(contenders: Mapping[str, Callable[[], float | None]], seconds: float) -> int:
    """How many rounds take about so long, from one of each; at least five."""
    once = measure(contenders, 1, warm_up=2)
    return max(5, int(seconds / sum(timing.median for timing in once.values())))


def ratio(timings: Mapping[str, Timing], name: str, to: str) -> float:
    """The median over rounds of one contender's time over another's in the same round.

    Both numbers of a pair saw the same neighbours on the machine, which two medians did not.
    """
    pairs = zip(timings[name].seconds, timings[to].seconds, strict=True)
    return statistics.median(a / b for a, b in pairs)


def table(
    timings: Mapping[str, Timing], against: list[str], more: Mapping[str, Mapping[str, str]] | None = None
) -> str:
    """A Markdown table: medians, quartiles, ratios to each of `against`, and `more` columns by their names."""
    columns = more or {}
    heads = [f"× {name}" for name in against] + list(columns)
    lines = [
        "| | ms a window (quartiles) | " + " | ".join(heads) + " |",
        "| --- | ---: |" + " ---: |" * len(heads),
    ]
    for name, timing in timings.items():
        low, high = timing.quartiles
        cells = [f"{ratio(timings, name, to):.2f}" for to in against] + [column[name] for column in columns.values()]
        lines.append(
            f"| {name} | {timing.median * 1e3:.1f} ({low * 1e3:.1f} to {high * 1e3:.1f}) | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def compared(timings: Mapping[str, Timing], pairs: Iterable[tuple[str, str, float | None]]) -> str:
    """The `against_goals` of those pairs of names that were timed: how many times as long the first takes."""
    timed = [(a, b, goal) for a, b, goal in pairs if a in timings and b in timings]
    return against_goals((f"{a} / {b}", f"{ratio(timings, a, b):.2f}", goal) for a, b, goal in timed)


def against_goals(rows: Iterable[tuple[str, str, float | None]]) -> str:
    """A Markdown table of what was measured, as it is to be read, and what is wanted at most, if anything."""
    lines = ["| | measured | wanted, at most |", "| --- | ---: | ---: |"]
    for what, measured, goal in rows:
        lines.append(f"| {what} | {measured} | {'' if goal is None else f'{goal:.2f}'} |")
    return "\n".join(lines)


def figure(timings: Mapping[str, Timing], title: str, path: Path) -> None:
    """Bars of the medians with their quartiles, ours in colour, the floor as a line."""
    import matplotlib.pyplot as plt

    names = [name for name in timings if name != "floor"][::-1]
    medians = [timings[name].median * 1e3 for name in names]
    errors = [[abs(timings[n].quartiles[i] * 1e3 - m) for n, m in zip(names, medians, strict=True)] for i in (0, 1)]
    shown, axes = plt.subplots(figsize=(8, 0.4 * len(names) + 1.4), layout="constrained")
    colours = ["tab:blue" if name.startswith("ours") else "silver" for name in names]
    axes.barh(names, medians, xerr=errors, color=colours, error_kw={"elinewidth": 1, "ecolor": "dimgray"})
    if "floor" in timings:
        axes.axvline(timings["floor"].median * 1e3, color="black", linestyle=":", label="floor")
        shown.legend(loc="outside lower right", frameon=False)
    axes.set_xlabel("ms a window (median, quartiles)")
    shown.suptitle(textwrap.fill(title, 90), fontsize=10)
    shown.savefig(path, dpi=110)
    plt.close(shown)


def page(script: str, on_gpu: bool) -> Path:
    """Where a script's results stand: a GPU's on a page of their own."""
    path = Path(script)
    return path.with_name(f"{path.stem}-gpu.md" if on_gpu else f"{path.stem}.md")


def section(page: Path, head: str, title: str, body: str) -> None:
    """Writes one part of a page, in place of the part of the same title; `head` begins a new page."""
    text = page.read_text() if page.exists() and page.read_text().startswith(head) else head
    parts = re.split(r"(?m)^(?=## )", text)
    new = f"## {title}\n\n{body}"
    places = [i for i, part in enumerate(parts) if part.startswith(f"## {title}\n")]
    if places:
        parts[places[0]] = new
    else:
        parts.append(new)
    page.write_text("\n\n".join(part.strip("\n") for part in parts) + "\n")


def circumstances(*packages: str) -> str:
    """Hardware, versions and commit, for the head of a page of results."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    python = platform.python_version()
    kept = ", memory kept by glibc" * is_kept() + " in one arena" * (os.environ.get("MALLOC_ARENA_MAX") == "1")
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} × {cpu}, Python {python}, {versions}{kept}, commit {commit}"


def is_kept() -> bool:
    """Whether glibc was told, as `run.py` does, to keep what is freed between windows."""
    return "MALLOC_TRIM_THRESHOLD_" in os.environ


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
