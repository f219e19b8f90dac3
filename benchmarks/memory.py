"""Predicted against measured: what a window of two micro-batches takes, in a process of its own each time.

python benchmarks/memory.py                the tables
python benchmarks/memory.py --write        and the page
python benchmarks/memory.py torch/mlp      one table
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from interleaved import circumstances

ROOT = Path(__file__).parent.parent
# The default heap of glibc keeps holes; with this, freed memory goes back, and what is measured is what was asked for.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
SIZES = {
    "torch": {
        "mlp": (5000, 8192, 12000, 16384, 24000), "transformer": (32, 48, 64, 96, 160),
        "convnet": (96, 128, 192, 256, 400),
    },
    "jax": {
        "mlp": (8192, 12000, 16384, 20000, 24000), "transformer": (32, 48, 64, 96, 128),
        "convnet": (500, 700, 900, 1200, 1600),
    },
}  # fmt: skip
for backend in ("tensorflow", "jax", "torch"):
    SIZES[f"keras_{backend}"] = {"mlp": (8192, 12000, 16384, 20000, 24000), "convnet": (300, 400, 500, 700, 900)}


def measure(framework: str, model: str, micro_batch: int, environment: dict[str, str]) -> list[float]:
    """Bytes predicted and bytes measured, and what else the worker says."""
    room, _, backend = framework.partition("_")
    worker = ROOT / f"tests/{room}/peak_of_a_window.py"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, str(worker), model, str(micro_batch), "2"],
        env={**clean, "KERAS_BACKEND": backend, **environment}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def table(framework: str, model: str) -> str:
    several = framework == "torch"
    head = ["micro-batch", "predicted MiB", "measured MiB", "off by"]
    head += ["with glibc's default", "off by", "seconds to predict", "grew by MiB"] * several
    lines = ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]

    def row(size: int) -> str:
        needs, measured, *rest = measure(framework, model, size, EXACT)
        cells = [f"{size:,}", *(f"{x / 2**20:.0f}" for x in (needs, measured)), f"{needs / measured - 1:+.1%}"]
        if several:
            _, default, *_ = measure(framework, model, size, {})
            seconds, growth = rest
            cells += [f"{default / 2**20:.0f}", f"{needs / default - 1:+.1%}"]
            cells += [f"{seconds:.2f}", f"{growth / 2**20:.0f}"]
        line = "| " + " | ".join(cells) + " |"
        print(framework, model, line, flush=True)
        return line

    # Two at a time, but for the seconds.
    with ThreadPoolExecutor(1 if several else 2) as pool:
        lines += pool.map(row, SIZES[framework][model])
    return "\n".join(lines)


HEAD = f"""# Memory: predicted against measured

`python benchmarks/memory.py --write`; `torch/convnet` after it measures one table and leaves the others.

A window of two micro-batches, each row in a process of its own (`tests/*/peak_of_a_window.py`: the three models and how
it is measured). Measured is the highest resident memory during the window over what was resident before it, with
`MALLOC_MMAP_THRESHOLD_={EXACT["MALLOC_MMAP_THRESHOLD_"]}` in the environment: glibc then gives back what is freed.

PyTorch's is predicted on fake tensors. The default heap of glibc keeps holes between tensors of less than 32 MiB, more
or fewer from run to run, and no prediction of tensors sees them ("with glibc's default"); the plan's reserve on a CPU
is for that. JAX's is the compiler's account: outputs and temporaries, less what is aliased. Keras's is its backend's:
`fit`'s window with the MLP and a small convolutional network, on TensorFlow read off the traced graph.
"""


def main() -> None:
    every = [f"{framework}/{model}" for framework, models in SIZES.items() for model in models]
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", default=every, metavar="table", help=", ".join(every))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    page = Path(__file__).parent / "memory.md"
    kept = dict(re.findall(r"^## (\S+)\n\n(.*?)\n(?=\n## |\Z)", page.read_text(), re.M | re.S)) if page.exists() else {}
    for name in options.tables:
        packages = name.split("/")[0].replace("tensorflow", "tensorflow-cpu").split("_")
        kept[name] = f"{table(*name.split('/'))}\n\n{circumstances(*packages)}, one thread."
        if options.write:
            page.write_text(HEAD + "".join(f"\n## {name}\n\n{kept[name]}\n" for name in every if name in kept))


if __name__ == "__main__":
    main()
