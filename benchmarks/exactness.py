"""What `loss / 64` is off by: the demo's job, whose epochs end in a window of 26 micro-batches, the last one of 13.

python benchmarks/exactness.py [--write]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from interleaved import circumstances
from torch import nn

from bigbatch.demo import Job, Result
from bigbatch.demo.torch import layers, network, train

N = 64


def by_hand(job: Job, tail: str) -> Result:
    """The recipe people paste. `tail` is what it does with the end of an epoch: "step", or "leave" it to the next."""
    x, y, _, _ = map(torch.from_numpy, job.data)
    model = network(job)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.rate, weight_decay=job.weight_decay)
    updates = job.updates(job.batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: job.rate_at(k, updates) / job.rate)
    taken = 0
    for rows in map(torch.from_numpy, job.batches(job.batch)):
        parts = rows.split(job.micro_batch)
        for i, part in enumerate(parts):
            (F.cross_entropy(model(x[part]), y[part]) / N).backward()
            taken += 1
            if taken % N == 0 or (tail == "step" and i + 1 == len(parts)):
                nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                taken = 0
    return Result([], 0.0, layers(model), None, 0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/exactness.md")
    options = parser.parse_args()
    job = Job()
    full = train("full", job, lambda n: None)
    rows = {
        "`loss / 64`, stepping at the end of an epoch": by_hand(job, "step"),
        "`loss / 64`, carrying the rest into the next epoch": by_hand(job, "leave"),
        "`bb.Accumulator(…, every=64)` and `flush()`": train("stream", job, lambda n: None),
        "`bb.backward(…, micro_batch=16)`": train("split", job, lambda n: None),
    }
    lines = ["| | largest difference of a weight from the true batch's |", "| --- | ---: |"]
    lines += [f"| {name} | {result.distance(full):.1e} |" for name, result in rows.items()]
    print("\n".join(lines))
    if options.write:
        scale = max(abs(kernel).max() for kernel, _ in full.layers)
        Path(__file__).with_suffix(".md").write_text(
            "# Exactness on the demo's job\n\nA network on scikit-learn's digits, float32, AdamW with clipping and a "
            "schedule, batches of 1,024 as 64 micro-batches of 16; an epoch of 1,437 examples ends in a window of 26 "
            f"micro-batches, the last of 13. 30 epochs, 60 updates; the largest weight is {scale:.2f}.\n\n"
            + "\n".join(lines)
            + f"\n\n{circumstances('torch')}.\n\n    python benchmarks/exactness.py --write\n"
        )


if __name__ == "__main__":
    main()
