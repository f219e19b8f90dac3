"""How a window's time and memory grow with the number of micro-batches, and with the model.

    python benchmarks/growth.py torch|jax [--write]

Wanted: time a micro-batch and peak memory flat in N, the batch's own data apart.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from interleaved import circumstances, measure, section

PAGE = Path(__file__).with_suffix(".md")
SIZE = 16
COUNTS = (1, 2, 4, 16, 64, 256, 1024)
WIDTHS = {1: 256, 4: 640, 16: 1440}  # numbers in the model, × 1, 4 and 16
REPETITIONS = 20
HEAD = f"""# Growth

Micro-batches of {SIZE}, an MLP 784-width-width-10, SGD (whose step needs no memory), float32, on a CPU. The peak is
what a window holds at once beyond parameters and the batch's own data: of tensors in PyTorch, by the compiler's account
in JAX. Times are medians of {REPETITIONS} interleaved windows, fewer of the long ones.
"""


def torch(width, n):
    """Windows of each way, and their peaks in bytes."""
    import torch
    import torch.nn.functional as F
    from torch_jobs import digits, mlp

    import bigbatch.torch as bb
    from bigbatch.engines.torch_memory import PeakMemory

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

    def by_hand(model, optimizer, x, y):
        for a, b in zip(x.split(SIZE), y.split(SIZE), strict=True):
            (F.cross_entropy(model(a), b) * SIZE / len(x)).backward()
        optimizer.step()
        optimizer.zero_grad()

    x, y = digits(n * SIZE)
    runs, peaks = {}, {}
    for name, way in {"by hand": by_hand, "ours, stream in micro_batch()": stream, "ours, split": split}.items():
        torch.manual_seed(0)
        model = mlp(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        way(model, optimizer, x[:SIZE], y[:SIZE])
        with PeakMemory() as memory:
            way(model, optimizer, x, y)
        peaks[name] = memory.peak
        runs[name] = lambda way=way, model=model, optimizer=optimizer: way(model, optimizer, x, y)
    return runs, peaks


def jax(width, n):
    """The same of compiled windows."""
    import jax
    import jax.numpy as jnp
    from jax_jobs import dense, digits, mlp_loss

    import bigbatch.jax as bb

    keys = jax.random.split(jax.random.key(0), 3)
    x, y = digits(n * SIZE)

    def by_hand(params, x, y):
        def body(sums, part):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(mlp_loss)(params, *part)), None

        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(body, start, [a.reshape(n, SIZE, *a.shape[1:]) for a in (x, y)])
        return jax.tree.map(lambda s: s / n, sums)

    def window(gradient):
        def step(params, x, y):
            _, grads = gradient(params, x, y)
            return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

        widths = (784, width, width, 10)
        params = [dense(key, a, b) for key, a, b in zip(keys, widths[:-1], widths[1:], strict=True)]
        compiled = jax.jit(step, donate_argnums=0).lower(params, x, y).compile()
        memory = compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        own = x.nbytes + y.nbytes + sum(p.nbytes for p in jax.tree.leaves(params))

        def run():
            nonlocal params
            params = jax.block_until_ready(compiled(params, x, y))

        return run, held + memory.temp_size_in_bytes - own

    ours = bb.value_and_grad(mlp_loss, micro_batch=SIZE, in_axes=(None, 0, 0))
    made = {"by hand": window(by_hand), "ours, split": window(ours)}
    return {name: run for name, (run, _) in made.items()}, {name: peak for name, (_, peak) in made.items()}


def table(found, column, heads) -> str:
    lines = ["| " + " | ".join(["", *heads]) + " |", "| --- |" + " ---: |" * len(heads)]
    lines += [f"| {name} | " + " | ".join(f"{row[name][column]:.2f}" for row in found) + " |" for name in found[0]]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=["torch", "jax"])
    parser.add_argument("--write", action="store_true", help="write the framework's part of benchmarks/growth.md")
    options = parser.parse_args()
    make = {"torch": torch, "jax": jax}[options.framework]

    def windows(width, n):
        runs, peaks = make(width, n)
        timings = measure(runs, max(3, min(REPETITIONS, 512 // n)), warm_up=1)
        return {name: (timings[name].median / n * 1e3, peaks[name] / 2**20) for name in runs}

    by_count = [windows(512, n) for n in COUNTS]
    by_width = [windows(width, 16) for width in WIDTHS.values()]
    parts = []
    for title, found, heads in (
        ("Micro-batches a window (width 512)", by_count, [f"N = {n:,}" for n in COUNTS]),
        ("The model's size (16 micro-batches)", by_width, [f"× {times}" for times in WIDTHS]),
    ):
        times, peaks = table(found, 0, heads), table(found, 1, heads)
        parts.append(f"**{title}**, milliseconds a micro-batch:\n\n{times}\n\nPeak MiB:\n\n{peaks}")
    growth = ", ".join(f"{name} {by_count[-1][name][1] / by_count[1][name][1]:.4f}" for name in by_count[0])
    parts.append(f"Peak at N = 1,024 over N = 2 (wanted: at most 1.02): {growth}.")
    print("\n\n".join(parts))
    if options.write:
        figure, (times, peaks) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for name in by_count[0]:
            times.plot(COUNTS, [row[name][0] for row in by_count], marker=".", label=name)
            peaks.plot(COUNTS, [row[name][1] for row in by_count], marker=".", label=name)
        for axes, label in ((times, "ms a micro-batch"), (peaks, "peak MiB")):
            axes.set(xscale="log", xlabel="micro-batches a window", ylabel=label, ylim=(0, None))
        times.legend()
        figure.savefig(PAGE.with_name(f"growth-{options.framework}.png"), dpi=110)
        body = (
            "\n\n".join(parts) + f"\n\n![growth](growth-{options.framework}.png)\n\n"
            f"{circumstances(options.framework)}.\n\n    python benchmarks/growth.py {options.framework} --write\n"
        )
        section(PAGE, HEAD, options.framework, body)


if __name__ == "__main__":
    main()
