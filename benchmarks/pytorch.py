"""PyTorch: one window of an MLP, ours against the loop an expert writes, accelerate, and the floor.

    python benchmarks/pytorch.py [--repetitions 200]

The floor is N forwards and backwards and one update, each gradient thrown away before the next comes: no way of
accumulating can be faster without a faster backward.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from interleaved import circumstances, measure, ratio, table
from torch import nn

import bigbatch.torch as bb

N, SIZE = 16, 16


def contenders():
    torch.manual_seed(0)
    x, y = torch.randn(N * SIZE, 784), torch.randint(10, (N * SIZE,))
    parts = list(zip(x.split(SIZE), y.split(SIZE), strict=True))

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
        return model, torch.optim.Adam(model.parameters())

    def floor(model, optimizer):
        def run():
            for a, b in parts:
                optimizer.zero_grad()
                F.cross_entropy(model(a), b).backward()
            optimizer.step()

        return run

    def hand_written(model, optimizer):
        def run():
            for a, b in parts:
                (F.cross_entropy(model(a), b) / N).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def hand_written_guarded(model, optimizer):
        """The same with what our update also does: the loss and the gradient's norm, seen by the host."""

        def run():
            total = torch.zeros(())
            for a, b in parts:
                loss = F.cross_entropy(model(a), b) / N
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if torch.isfinite(norm) and torch.isfinite(total):
                optimizer.step()
            optimizer.zero_grad()

        return run

    def hand_written_split(model, optimizer):
        """From a whole batch, with the mean loss that the split door returns."""

        def run():
            total = torch.zeros(())
            for a, b in zip(x.split(SIZE), y.split(SIZE), strict=True):
                loss = F.cross_entropy(model(a), b) / N
                loss.backward()
                total += loss.detach()
            total.item()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def accelerate(model, optimizer):
        accelerator = Accelerator(gradient_accumulation_steps=N, cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)

        def run():
            for a, b in parts:
                with accelerator.accumulate(model):
                    accelerator.backward(F.cross_entropy(model(a), b))
                    optimizer.step()
                    optimizer.zero_grad()

        return run

    def stream(model, optimizer):
        acc = bb.Accumulator(optimizer, every=N)

        def run():
            for a, b in parts:
                acc.backward(F.cross_entropy(model(a), b), items=len(a))

        return run

    def split(model, optimizer):
        def run():
            bb.backward(lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y), micro_batch=SIZE)
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {
        "floor": floor(*make()),
        "hand-written": hand_written(*make()),
        "hand-written, guarded": hand_written_guarded(*make()),
        "hand-written, from a batch": hand_written_split(*make()),
        "accelerate": accelerate(*make()),
        "ours, stream": stream(*make()),
        "ours, split": split(*make()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="write benchmarks/pytorch.md")
    options = parser.parse_args()
    timings = measure(contenders(), options.repetitions)
    shown = table(timings, ["hand-written", "floor"])
    print(shown)
    for door, by_hand in (
        ("stream", "hand-written"),
        ("split", "hand-written"),
        ("split", "hand-written, from a batch"),
    ):
        print(f"{door} / {by_hand}: {ratio(timings, f'ours, {door}', by_hand):.3f} (wanted: at most 1.02)")
    if options.write:
        page = Path(__file__).with_suffix(".md")
        page.write_text(
            f"# PyTorch\n\nOne window of {N} micro-batches of {SIZE}: MLP 784-1024-1024-10, Adam, float32, on a CPU. "
            "Every contender once a round, in an order drawn anew; a ratio is the median over rounds of both times in "
            f"one round. {options.repetitions} rounds.\n\n{shown}\n\n"
            "*Guarded* is the hand-written loop with what our update also does: the window's loss and the gradient's "
            "norm, seen by the host before the step. *From a batch* cuts the batch itself and reads the mean loss, as "
            "the split door does. The allocator is kept from giving memory back between windows (glibc's "
            "`MALLOC_TRIM_THRESHOLD_` and `MALLOC_MMAP_THRESHOLD_`, which the command below sets): page faults would "
            "otherwise be up to a tenth of the time, a different one in each contender.\n\n"
            f"{circumstances('torch', 'accelerate')}.\n\n"
            "    MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_THRESHOLD_=1073741824 \\\n"
            f"    python benchmarks/pytorch.py --repetitions {options.repetitions} --write\n"
        )


if __name__ == "__main__":
    main()
