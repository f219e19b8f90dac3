"""How a window's time and memory grow with the number of micro-batches, and with the model.

    python benchmarks/growth.py torch [--write]

And with jax, tensorflow, tf1, keras_tensorflow, keras_jax, keras_torch: each writes its own part of growth.md.
Wanted: time a micro-batch and peak memory flat in N, the batch's own data apart.
"""

import argparse
import importlib
import os

import matplotlib.pyplot as plt
from interleaved import circumstances, measure, page, section

COUNTS = (1, 2, 4, 16, 64, 256, 1024)
WIDTHS = {1: 256, 4: 640, 16: 1440}  # numbers in the model, × 1, 4 and 16
REPETITIONS = 20
TITLES = {
    "torch": "PyTorch",
    "jax": "JAX",
    "tensorflow": "TensorFlow 2, in tf.function",
    "tf1": "TensorFlow 1, session.run",
    "keras_tensorflow": "Keras on TensorFlow, fit's train function",
    "keras_jax": "Keras on JAX, fit's train function",
    "keras_torch": "Keras on PyTorch, fit's train function",
}
ABOUT = f"""
Micro-batches of 16, an MLP 784-width-width-10, SGD (whose step needs no memory), float32. The peak is what a window
holds at once beyond the parameters and the batch's own data: of tensors in PyTorch, by the compiler's account in JAX,
and in TensorFlow, which keeps none on a CPU, what a process of its own held more at each point (`resident.py`), to half
a MiB. Times are medians of {REPETITIONS} interleaved windows, at least three of the long ones.
"""
HEAD = f"""# Growth
{ABOUT}
In JAX the window of `bb.accumulate` is N calls of one compiled step, so that its memory knows no N; the same is in
[jax_window.md](jax_window.md).

In TensorFlow, of both kinds, the rows of factors that wait fill their room by N = 16: the peak grows until there, and
hardly after. In PyTorch that room is made when the window opens.
"""


def table(found, heads) -> str:
    lines = ["| " + " | ".join(["", *heads]) + " |", "| --- |" + " ---: |" * len(heads)]
    lines += [f"| {name} | " + " | ".join(f"{row[name]:.2f}" for row in found) + " |" for name in found[0]]
    return "\n".join(lines)


def figure(times, peaks, path):
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for several, ax, label in ((times, axes[0], "ms a micro-batch"), (peaks, axes[1], "peak MiB")):
        for name, style in zip(several[0], ("-", "--", ":"), strict=False):  # one may lie on another
            ax.plot(COUNTS, [row[name] for row in several], style, marker=".", label=name)
        ax.set(xscale="log", xlabel="micro-batches a window", ylabel=label, ylim=(0, None))
    axes[0].legend()
    drawn.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=TITLES)
    parser.add_argument("--write", action="store_true", help="write the framework's part of benchmarks/growth.md")
    options = parser.parse_args()
    name = options.framework
    room, _, backend = name.partition("_")
    os.environ["KERAS_BACKEND"] = backend or "tensorflow"  # before Keras is imported
    module = importlib.import_module(f"growth_{room}")

    def milliseconds(width, n):
        timings = measure(module.windows(width, n), max(3, min(REPETITIONS, 512 // n)), warm_up=1)
        return {way: timing.median / n * 1e3 for way, timing in timings.items()}

    points = [(512, n) for n in COUNTS] + [(width, 16) for width in WIDTHS.values()]
    times = [milliseconds(*point) for point in points]
    peaks = [{way: size / 2**20 for way, size in row.items()} for row in module.peaks(points)]
    parts = []
    for title, some, heads in (
        ("Micro-batches a window (width 512)", slice(len(COUNTS)), [f"N = {n:,}" for n in COUNTS]),
        ("The model's size (16 micro-batches)", slice(len(COUNTS), None), [f"× {times}" for times in WIDTHS]),
    ):
        parts.append(
            f"**{title}**, milliseconds a micro-batch:\n\n{table(times[some], heads)}\n\n"
            f"Peak MiB:\n\n{table(peaks[some], heads)}"
        )
    at = dict(zip(COUNTS, peaks, strict=False))
    over = {n: ", ".join(f"{way} {at[1024][way] / at[n][way]:.3f}" for way in peaks[0]) for n in (2, 16)}
    parts.append(f"Peak at N = 1,024 over N = 2 (wanted: at most 1.02): {over[2]}. Over N = 16: {over[16]}.")
    print("\n\n".join(parts))
    if options.write:
        on_gpu = "GPU" in module.ON
        written = page(__file__, on_gpu)
        figure(times[: len(COUNTS)], peaks[: len(COUNTS)], written.with_name(f"{written.stem}-{name}.png"))
        body = (
            "\n\n".join(parts) + f"\n\n![growth]({written.stem}-{name}.png)\n\n"
            f"On {module.ON}. {circumstances(*module.PACKAGES)}.\n\n    python benchmarks/growth.py {name} --write\n"
        )
        section(written, f"# Growth on a GPU\n{ABOUT}" if on_gpu else HEAD, TITLES[name], body)


if __name__ == "__main__":
    main()
