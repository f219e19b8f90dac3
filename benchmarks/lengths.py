"""Sequences of different lengths: what is computed of a window, and how long it takes, with and without the padding.

    python benchmarks/lengths.py [--repetitions 5] [--write]

The cuts alone are of 512 documents a window, lognormal (median 300, sigma 1.1, at most 8,192 tokens), with a budget
of 32,768 tokens. The times are of a transformer language model of 2 blocks, width 64 and 1,000 words on 32 documents
(median 60, at most 768) with a budget of 3,072 tokens.
"""

import argparse
import math
import random
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_jobs
from interleaved import against_goals, circumstances, measure, ratio, table
from torch import nn

import bigbatch.torch as bb
from bigbatch.lengths import Cut, cuts

PAGE = Path(__file__).with_suffix(".md")
MOST, LONGEST, WORDS = 3072, 768, 1000


def lognormal(count, median, longest, seed):
    draw = random.Random(seed)
    return [max(2, min(longest, int(draw.lognormvariate(math.log(median), 1.1)))) for _ in range(count)]


def fixed(lengths, rows, width=None):
    """Micro-batches of so many rows in the given order: untrimmed with a `width`, else trimmed."""
    places = [list(range(i, min(i + rows, len(lengths)))) for i in range(0, len(lengths), rows)]
    return [Cut(place, width or max(lengths[i] for i in place)) for place in places]


def ways_to_cut(lengths, most, longest):
    rows = most // longest
    return {
        "fixed micro-batch, untrimmed": fixed(lengths, rows, longest),
        "fixed micro-batch, trimmed": fixed(lengths, rows),
        "ours, in the given order": cuts(lengths, most, order="given"),
        "ours, by length": cuts(lengths, most),
    }


def cut_table(windows, most, longest):
    """Padded over true tokens, and micro-batches over the fewest, of several windows."""
    lines = ["| | padded / true tokens | micro-batches / fewest |", "| --- | ---: | ---: |"]
    for name in ways_to_cut(windows[0], most, longest):
        padded = count = 0
        for lengths in windows:
            found = ways_to_cut(lengths, most, longest)[name]
            padded += sum(cut.tokens for cut in found)
            count += len(found)
        true = sum(map(sum, windows))
        fewest = sum(math.ceil(sum(lengths) / most) for lengths in windows)
        lines.append(f"| {name} | {padded / true:.2f} | {count / fewest:.2f} |")
    return "\n".join(lines)


def planning_milliseconds():
    lengths, seconds = lognormal(4096, 300, 8192, 0), []
    for _ in range(15):
        started = time.perf_counter()
        cuts(lengths, 32_768)
        seconds.append(time.perf_counter() - started)
    return 1e3 * min(seconds)


class Model(nn.Module):
    """A causal language model without padding in its attention's past: it stands on the right."""

    def __init__(self):
        super().__init__()
        self.body = torch_jobs.Transformer(WORDS, 64, 2, LONGEST)

    def forward(self, ids):
        return self.body(ids)


def loss_fn(model, batch):
    labels = batch["ids"].masked_fill(~batch["mask"], -100)[:, 1:]
    logits = model(batch["ids"])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), (labels != -100).sum()


def contenders(lengths):
    torch.manual_seed(0)
    mask = torch.arange(LONGEST) < torch.tensor(lengths)[:, None]
    batch = {"ids": torch.randint(1, WORDS, mask.shape) * mask, "mask": mask}

    def window(run):
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.Adam(model.parameters())

        def whole():
            run(model)
            optimizer.step()
            optimizer.zero_grad()

        return whole

    def split(micro_batch):
        return window(lambda model: bb.backward(lambda part: loss_fn(model, part), batch, micro_batch=micro_batch))

    def trimmed(model):
        """The split API's own loop over micro-batches of a fixed size, trimmed by the loss function."""

        def loss_of(part):
            width = int(part["mask"].sum(1).max())
            return loss_fn(model, {name: leaf[:, :width] for name, leaf in part.items()})

        bb.backward(loss_of, batch, micro_batch=MOST // LONGEST)

    return {
        "fixed micro-batch, untrimmed": split(MOST // LONGEST),
        "fixed micro-batch, trimmed": window(trimmed),
        "ours, in the given order": split(bb.tokens(MOST, mask="mask", order="given")),
        "ours, by length": split(bb.tokens(MOST, mask="mask")),
    }


def draw(lengths, most, longest, path):
    """Each micro-batch as an area of rows × length: its tokens, and its padding."""
    import matplotlib.pyplot as plt

    shown, panes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    found = ways_to_cut(lengths, most, longest)
    for axes, name in zip(panes, ("fixed micro-batch, trimmed", "ours, by length"), strict=True):
        row = 0
        for cut in found[name]:
            count = len(cut.indices)
            axes.barh(range(row, row + count), [cut.length] * count, height=1, align="edge", color="lightgray")
            own = sorted((lengths[i] for i in cut.indices), reverse=True)
            axes.barh(range(row, row + count), own, height=1, align="edge", color="tab:blue")
            row += count
        padded = sum(cut.tokens for cut in found[name])
        axes.set_title(f"{name}: {padded / sum(lengths):.2f} × the true tokens", fontsize=10)
        axes.set_xlabel("tokens of an example (blue) and padding (gray)")
        axes.set_ylim(row, 0)
    panes[0].set_ylabel("examples, micro-batch after micro-batch")
    shown.savefig(path, dpi=110)
    plt.close(shown)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="rounds of the timed part")
    parser.add_argument("--write", action="store_true", help="write benchmarks/lengths.md and its figure")
    options = parser.parse_args()
    windows = [lognormal(512, 300, 8192, seed) for seed in range(10)]
    of_cuts, planning = cut_table(windows, 32_768, 8192), planning_milliseconds()
    timings = measure(contenders(lognormal(32, 60, LONGEST, 1)), options.repetitions, warm_up=1)
    names = ["fixed micro-batch, untrimmed", "fixed micro-batch, trimmed"]
    of_times = table(timings, names)
    goals = [(f"ours, by length / {name}", ratio(timings, "ours, by length", name)) for name in names]
    verdict = against_goals(
        [(name, f"{value:.2f}", goal) for (name, value), goal in zip(goals, (0.30, 0.80), strict=True)]
        + [("ms to plan the cuts of 4,096 examples", f"{planning:.2f}", 2.0)]
    )
    print(of_cuts, of_times, verdict, sep="\n\n")
    if options.write:
        draw(windows[0][:128], 32_768, 8192, PAGE.with_name("lengths.png"))
        cut, timed = textwrap.wrap(__doc__.split("\n\n")[2].replace("\n", " "), 10_000)[0].split(" The times are of ")
        PAGE.write_text(
            f"# Sequences of different lengths\n\n{cut}\n\n{of_cuts}\n\n![padding as area](lengths.png)\n\n"
            f"The figure shows 128 of them. The times below are of {timed} A fixed micro-batch has as many rows as the "
            f"budget holds of the longest example. Every contender once a round, in an order drawn anew; "
            f"{options.repetitions} rounds.\n\n{of_times}\n\n{verdict}\n\n{circumstances('torch')}.\n\n"
            f"    python benchmarks/lengths.py --repetitions {options.repetitions} --write\n"
        )


if __name__ == "__main__":
    main()
