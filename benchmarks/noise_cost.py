"""What measuring the noise scale costs: a measured window against one that is not, on the transformer.

    python benchmarks/noise_cost.py [--repetitions 12] [--write]

A measured window takes the norm of every micro-batch's gradient, and none of its weight gradients is fused. With
`noise=True` one window in twenty is measured, so a window costs a twentieth of the difference more.
"""

import argparse
from pathlib import Path

import torch_jobs
from interleaved import circumstances, measure, ratio, table

import bigbatch.torch as bb


def contenders(job):
    x, y = job.batch()
    parts = list(zip(x.split(job.size), y.split(job.size), strict=True))

    def window(noise, fused):
        model, optimizer = job.make()
        acc = bb.Accumulator(optimizer, every=job.micro_batches, noise=noise, fused=fused)

        def run():
            for a, b in parts:
                acc.backward(job.loss(model, a, b), items=len(a))

        return torch_jobs.timed(run)

    return {
        "not measured": window(False, True),
        "measured": window(1, True),
        "not measured, fused=False": window(False, False),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--write", action="store_true", help="write benchmarks/noise_cost.md")
    options = parser.parse_args()
    job = torch_jobs.JOBS["transformer"]
    timings = measure(contenders(job), options.repetitions, warm_up=2)
    shown = table(timings, ["not measured", "not measured, fused=False"])
    more, plain = (ratio(timings, "measured", to) - 1 for to in ("not measured", "not measured, fused=False"))
    verdict = (
        f"A measured window takes {more:+.1%}, and {plain:+.1%} against one that is left to autograd as it is itself. "
        f"With `noise=True`, one in twenty: {more / 20:+.1%} a window (wanted: at most +3 %)."
    )
    print(shown, verdict, sep="\n\n")
    if options.write:
        Path(__file__).with_suffix(".md").write_text(
            f"# What measuring the noise scale costs\n\n{job.title}, {job.micro_batches} micro-batches a window, Adam, "
            f"float32, on {torch_jobs.ON}. Every contender once a round, in an order drawn anew; a ratio is the median "
            f"over rounds of both times in one round. {options.repetitions} rounds.\n\n{shown}\n\n{verdict}\n\n"
            f"{circumstances('torch')}.\n\n"
            f"    python benchmarks/noise_cost.py --repetitions {options.repetitions} --write\n"
        )


if __name__ == "__main__":
    main()
