"""PyTorch: how a window's time and memory grow with the number of micro-batches, and with the model.

    python benchmarks/torch_growth.py [--write]

Wanted: time a micro-batch and peak memory flat in N, the batch's own data apart.
"""

import argparse
import functools
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from interleaved import circumstances, measure
from torch_jobs import digits, mlp

import bigbatch.torch as bb
from bigbatch.engines.torch_memory import PeakMemory

PAGE = Path(__file__).with_suffix(".md")
SIZE = 16
COUNTS = (1, 2, 4, 16, 64, 256, 1024)
WIDTHS = {1: 256, 4: 640, 16: 1440}  # numbers in the model, × 1, 4 and 16
REPETITIONS = 20


def split(model, optimizer, x, y):
    bb.backward(lambda part: F.cross_entropy(model(part[0]), part[1]), (x, y), micro_batch=SIZE)
    optimizer.step()
    optimizer.zero_grad()


def stream(model, optimizer, x, y):
    acc = bb.Accumulator(optimizer, every=len(x) // SIZE)
    for a, b in zip(x.split(SIZE), y.split(SIZE), strict=True):
        with acc.micro_batch():
            loss = F.cross_entropy(model(a), b)
        acc.backward(loss, items=len(a))


def hand_written(model, optimizer, x, y):
    for a, b in zip(x.split(SIZE), y.split(SIZE), strict=True):
        (F.cross_entropy(model(a), b) * SIZE / len(x)).backward()
    optimizer.step()
    optimizer.zero_grad()


WAYS = {"hand-written": hand_written, "ours, stream in micro_batch()": stream, "ours, split": split}


def windows(width: int, n: int) -> dict[str, tuple[float, float]]:
    """Of each way, milliseconds a micro-batch (the median), and the peak in MiB beside model, state and data."""
    x, y = digits(n * SIZE)
    runs, peaks = {}, {}
    for name, way in WAYS.items():
        torch.manual_seed(0)
        model = mlp(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)  # whose own step needs no memory
        runs[name] = functools.partial(way, model, optimizer, x, y)
        way(model, optimizer, x[:SIZE], y[:SIZE])
        with PeakMemory() as memory:
            runs[name]()
        peaks[name] = memory.peak / 2**20
    timings = measure(runs, max(3, min(REPETITIONS, 512 // n)), warm_up=1)
    return {name: (timings[name].median / n * 1e3, peaks[name]) for name in WAYS}


def by_way(rows: list[dict[str, tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    return {name: [row[name] for row in rows] for name in WAYS}


def table(rows, heads) -> str:
    lines = ["| " + " | ".join(["", *heads]) + " |", "| --- |" + " ---: |" * len(heads)]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/torch_growth.md and its figure")
    options = parser.parse_args()
    by_count = by_way([windows(512, n) for n in COUNTS])
    by_width = by_way([windows(width, 16) for width in WIDTHS.values()])
    parts = []
    for title, found, heads in (
        ("Micro-batches a window (MLP 784-512-512-10)", by_count, [f"N = {n:,}" for n in COUNTS]),
        ("The model's size (16 micro-batches)", by_width, [f"× {times}" for times in WIDTHS]),
    ):
        times = table({name: [f"{ms:.2f}" for ms, _ in row] for name, row in found.items()}, heads)
        peaks = table({name: [f"{mib:.2f}" for _, mib in row] for name, row in found.items()}, heads)
        parts.append(f"## {title}\n\nMilliseconds a micro-batch:\n\n{times}\n\nPeak MiB:\n\n{peaks}")
    print("\n\n".join(parts))
    for name, row in by_count.items():
        print(f"{name}: peak at N = 1,024 / N = 2: {row[-1][1] / row[1][1]:.4f} (wanted: at most 1.02)")
    if options.write:
        figure, (times, peaks) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for name, row in by_count.items():
            times.plot(COUNTS, [ms for ms, _ in row], marker=".", label=name)
            peaks.plot(COUNTS, [mib for _, mib in row], marker=".", label=name)
        for axes, label in ((times, "ms a micro-batch"), (peaks, "peak MiB")):
            axes.set(xscale="log", xlabel="micro-batches a window", ylabel=label, ylim=(0, None))
        times.legend()
        figure.savefig(PAGE.with_suffix(".png"), dpi=110)
        PAGE.write_text(
            f"# Growth, in PyTorch\n\nMicro-batches of {SIZE}, SGD (whose step needs no memory), float32, on a CPU. "
            "The peak is what tensors hold at once in a window, beyond parameters, optimizer state and the batch's "
            f"own data. Times are medians, of {REPETITIONS} interleaved windows and fewer of the long ones.\n\n"
            + "\n\n".join(parts)
            + f"\n\n![growth](torch_growth.png)\n\n{circumstances('torch')}.\n\n"
            "    python benchmarks/torch_growth.py --write\n"
        )


if __name__ == "__main__":
    main()
