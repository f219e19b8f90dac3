"""Windows that close themselves against fixed ones, on the digits, over ten seeds.

    python benchmarks/noise.py [--write]

Every contender sees the same number of examples, at the constant learning rate that was best for it on a seed of its
own. The question: does the self-closing window reach the training loss that the best fixed window ends at, with no more
examples?
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from interleaved import circumstances
from sklearn.datasets import load_digits
from torch import nn

import bigbatch.torch as bb

MICRO_BATCH, EPOCHS, SEEDS, WRONG = 16, 20, range(10), 0.2
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
FIXED = {f"every={n}": n for n in (1, 2, 4, 8, 16, 32, 64)}
CLOSING = {f"until_noise(eta={eta:g})": bb.until_noise(eta=eta, at_most=256) for eta in (1.0, 2.0)}


def data():
    """The digits to train on, a fifth of their labels drawn anew: with a loss that does not go to zero."""
    pixels, labels = load_digits(return_X_y=True)
    draws = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(labels), generator=draws)[:1437]
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[rows], torch.tensor(labels)[rows]
    wrong = torch.rand(len(y), generator=draws) < WRONG
    return x, torch.where(wrong, torch.randint(10, y.shape, generator=draws), y)


def train(x, y, every, rate, seed):
    """(examples seen, loss of all that is trained on) an epoch, and the windows' items."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), every=every)
    seen, curve, items = 0, [], []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(MICRO_BATCH):
            update = acc.backward(F.cross_entropy(model(x[rows]), y[rows]), items=len(rows))
            seen += len(rows)
            if update:
                items.append(update.items)
        with torch.no_grad():
            curve.append((seen, F.cross_entropy(model(x), y).item()))
    return curve, items


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/noise.md and noise.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = data()
    runs, rates = {}, {}
    for name, every in {**FIXED, **CLOSING}.items():
        tried = {rate: train(x, y, every, rate, 100)[0][-1][1] for rate in RATES}
        rates[name] = min(tried, key=lambda rate: tried[rate] if math.isfinite(tried[rate]) else math.inf)
        runs[name] = [train(x, y, every, rates[name], seed) for seed in SEEDS]
    ends = {name: [curve[-1][1] for curve, _ in several] for name, several in runs.items()}
    best = min(FIXED, key=lambda name: statistics.mean(ends[name]))

    lines = [
        "| | rate | loss at the end, mean ± s.d. | items a window, median (5 % to 95 %) | reaches the best's loss |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, several in runs.items():
        items = sorted(n for _, window in several for n in window)
        middle, low, high = (items[int(len(items) * q)] for q in (0.5, 0.05, 0.95))
        reached = [
            next((seen for seen, loss in curve if loss <= target), None)
            for (curve, _), target in zip(several, ends[best], strict=True)
        ]
        made = [seen for seen in reached if seen is not None]
        said = f"{len(made)} of {len(reached)} seeds"
        said += f", with {statistics.median(made) / (EPOCHS * len(x)):.0%} of its examples" if made else ""
        named = f"{name} (best fixed)" if name == best else name
        loss = f"{statistics.mean(ends[name]):.3f} ± {statistics.stdev(ends[name]):.3f}"
        lines.append(f"| {named} | {rates[name]:g} | {loss} | {middle:.0f} ({low:.0f} to {high:.0f}) | {said} |")
    shown = "\n".join(lines)
    closing = min(CLOSING, key=lambda name: statistics.mean(ends[name]))
    diverged = [name for name, losses in ends.items() if statistics.stdev(losses) > 0.5]
    better = sum(a <= b for a, b in zip(ends[closing], ends[best], strict=True))
    verdict = (
        f"The better of the self-closing windows, {closing}, ends at or below the best fixed window ({best}) on "
        f"{better} of {len(SEEDS)} seeds after the same examples: {statistics.mean(ends[closing]):.3f} against "
        f"{statistics.mean(ends[best]):.3f}. "
        + (
            "It reaches what the best fixed window reaches, with no more examples."
            if better > len(SEEDS) // 2
            else "It does **not** reach what the best fixed window reaches. A fixed window at a rate tuned for it is "
            "the better choice here. The sizes jump (right): a network this small tells its noise badly in a few "
            "micro-batches."
        )
        + (f" A rate that is best on one seed diverges on others in {', '.join(diverged)}." if diverged else "")
    )
    print(shown, verdict, sep="\n\n")
    if options.write:
        figure(runs, best, closing)
        Path(__file__).with_suffix(".md").write_text(
            f"# Windows that close themselves\n\n{' '.join(__doc__.split('[--write]')[1].split())}\n\n"
            f"Scikit-learn's digits, 1,437 to train on, {WRONG:.0%} of the labels drawn anew; network 64-64-10 with "
            f"tanh, SGD with momentum 0.9, micro-batches of {MICRO_BATCH}, {EPOCHS} epochs; rates tried: "
            f"{', '.join(f'{r:g}' for r in RATES)}.\n\n{shown}\n\n{verdict}\n\n![loss and windows](noise.png)\n\n"
            f"{circumstances('torch')}.\n\n    python benchmarks/noise.py --write\n"
        )


def figure(runs, best, closing):
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = drawn.subplots(1, 2)
    for name, several in runs.items():
        mean = [
            (points[0][0], statistics.mean(p[1] for p in points))
            for points in zip(*(c for c, _ in several), strict=True)
        ]
        chosen = {best: "tab:blue", closing: "tab:orange"}.get(name)
        style = {"color": chosen or "0.8", "linewidth": 2 if chosen else 0.8, "label": name if chosen else None}
        left.plot(*zip(*mean, strict=True), **style)
        if chosen:
            right.plot(several[0][1], color=chosen, linewidth=1)
    left.set(xlabel="examples seen", ylabel="training loss, mean of ten seeds", yscale="log")
    left.legend(frameon=False)
    right.set(xlabel="update", ylabel="items in the window (seed 0)", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    drawn.savefig(Path(__file__).with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main()
