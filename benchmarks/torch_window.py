"""PyTorch: one window of three jobs, ours against the loop an expert writes, accelerate, Lightning, and the floor.

    python benchmarks/torch_window.py [mlp-16 transformer …] [--repetitions 60] [--write]

The floor is N forwards and backwards and one update, each gradient thrown away before the next comes. It makes each
weight's gradient in a tensor of its own, as autograd does; adding it straight into the sum can be faster than that.
On a GPU, where there is one: timed by its events.
"""

import argparse
import logging
import warnings

import lightning
import torch
from accelerate import Accelerator
from interleaved import OVER_THE_FLOOR, circumstances, compared, figure, is_kept, measure, page, rounds, section, table
from torch_jobs import DEVICE, JOBS, ON, ON_GPU, Job, Stopwatch, peak, timed

import bigbatch.torch as bb

PAGE = page(__file__, ON_GPU)
HEAD = """
Every contender once a round, in an order drawn anew; a ratio is the median over rounds of both times in one round.
*Peak* is the most that tensors held at once in a window, beyond the parameters and the optimizer's state.

*Hand-written* is the loop with `loss / N`. *Guarded* is the same with what our update also does: the window's loss and
the gradient's norm, seen by the host before the step. *From a batch* cuts the batch itself and reads the mean loss, as
the split door does. *Floor* is the forwards and backwards and one update, each gradient thrown away. With
*fused=False* ours leave all gradients to autograd.
*Lightning* is its Trainer with `barebones=True` (no logger, checkpoints, bars or checks) and
`accumulate_grad_batches`, over a list of micro-batches that are there already: an epoch of several windows, divided by
their number, without what `fit` does before and after it.
"""
ON_A_CPU = """
The allocator is kept from giving memory back between windows (glibc's settings in `run.py`), because page faults would
otherwise be part of the time, another part in each contender. *As glibc stands* is the same without that, as a user has
it who sets nothing: there, who makes the largest temporaries pays most.
"""
ON_A_GPU = """
Small models leave it waiting for its host, whose time is then what is measured: of Python and of PyTorch's launches.
"""
HEAD = f"# PyTorch on a GPU\n{HEAD}{ON_A_GPU}" if ON_GPU else f"# PyTorch\n{HEAD}{ON_A_CPU}"
AS_IT_STANDS = ", as glibc stands" * (not ON_GPU and not is_kept())


class Lightning(lightning.LightningModule):
    """A job's model as Lightning has it."""

    def __init__(self, job, model, optimizer):
        super().__init__()
        self.job, self.model, self.optimizer = job, model, optimizer

    def training_step(self, batch):
        return self.job.loss(self.model, *batch)

    def configure_optimizers(self):
        return self.optimizer


class Loader:
    """Micro-batches that are there already; of a list Lightning would make as many loaders."""

    def __init__(self, micro_batches):
        self.micro_batches = micro_batches

    def __len__(self):
        return len(self.micro_batches)

    def __iter__(self):
        return iter(self.micro_batches)


class Clock(lightning.Callback):
    """The seconds of an epoch."""

    def __init__(self):
        self.watch = Stopwatch()

    def on_train_epoch_start(self, trainer, module):
        self.watch.start()

    def on_train_epoch_end(self, trainer, module):
        self.seconds = self.watch.stop()


def contenders(job: Job):
    x, y = job.batch()
    n, size = job.micro_batches, job.size

    def parts():
        return zip(x.split(size), y.split(size), strict=True)

    micro_batches = list(parts())

    def floor(model, optimizer):
        def run():
            for a, b in micro_batches:
                optimizer.zero_grad()
                job.loss(model, a, b).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def hand_written(model, optimizer):
        def run():
            for a, b in micro_batches:
                (job.loss(model, a, b) / n).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def hand_written_guarded(model, optimizer):
        def run():
            total = torch.zeros((), device=DEVICE)
            for a, b in micro_batches:
                loss = job.loss(model, a, b) / n
                loss.backward()
                total += loss.detach()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if torch.isfinite(norm) and torch.isfinite(total):
                optimizer.step()
            optimizer.zero_grad()

        return run

    def hand_written_split(model, optimizer):
        def run():
            total = torch.zeros((), device=DEVICE)
            for a, b in parts():
                loss = job.loss(model, a, b) / n
                loss.backward()
                total += loss.detach()
            total.item()
            optimizer.step()
            optimizer.zero_grad()

        return run

    def accelerate(model, optimizer):
        accelerator = Accelerator(gradient_accumulation_steps=n, cpu=DEVICE.type == "cpu")
        model, optimizer = accelerator.prepare(model, optimizer)

        def run():
            for a, b in micro_batches:
                with accelerator.accumulate(model):
                    accelerator.backward(job.loss(model, a, b))
                    optimizer.step()
                    optimizer.zero_grad()

        return run

    def lightning_loop(model, optimizer, windows=4):
        module, clock = Lightning(job, model, optimizer), Clock()

        def run():
            trainer = lightning.Trainer(
                accelerator=DEVICE.type, devices=1, max_epochs=1, accumulate_grad_batches=n, barebones=True,
                callbacks=[clock],
            )  # fmt: skip
            trainer.fit(module, Loader(micro_batches * windows))
            return clock.seconds / windows

        return run

    def stream(model, optimizer, fused=True):
        acc = bb.Accumulator(optimizer, every=n, fused=fused)

        def run():
            for a, b in micro_batches:
                acc.backward(job.loss(model, a, b), items=len(a))

        return run

    def split(model, optimizer, fused=True):
        def run():
            bb.backward(lambda part: job.loss(model, *part), (x, y), micro_batch=size, fused=fused)
            optimizer.step()
            optimizer.zero_grad()

        return run

    ways = {
        "floor": floor,
        "hand-written": hand_written,
        "hand-written, guarded": hand_written_guarded,
        "hand-written, from a batch": hand_written_split,
        "accelerate": accelerate,
        "ours, stream": stream,
        "ours, stream, fused=False": lambda model, optimizer: stream(model, optimizer, fused=False),
        "ours, split, fused=False": lambda model, optimizer: split(model, optimizer, fused=False),
        "ours, split": split,
    }

    made = {name: timed(way(*job.make())) for name, way in ways.items()}
    return {**made, "Lightning": lightning_loop(*job.make())}


WANTED = {("mlp-16", "hand-written"): 0.85, ("mlp-16", "accelerate"): 0.75, ("transformer", "hand-written"): 0.85}
WANTED |= {(name, "floor"): goal for name, goal in OVER_THE_FLOOR.items()}


def pairs(name):
    """Ratios, and what is wanted at most."""
    for ours in ("ours, stream", "ours, split"):
        for to in ("hand-written", "accelerate", "Lightning", "floor"):
            yield ours, to, WANTED.get((name, to))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of {list(JOBS)}; all of them without")
    parser.add_argument("--repetitions", type=int, default=0, help="rounds; without, what takes about 25 seconds")
    parser.add_argument("--write", action="store_true", help="write the jobs' parts of benchmarks/torch_window.md")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    for name in options.jobs or JOBS:
        job = JOBS[name]
        runs = contenders(job)
        repetitions = options.repetitions or rounds(runs, 25)
        timings = measure(runs, repetitions)
        peaks = {way: f"{peak(run) / 2**20:.1f}" for way, run in runs.items()}  # the optimizer's state stands by now
        shown = table(timings, ["hand-written", "accelerate", "Lightning", "floor"], {"peak MiB": peaks})
        shown += f"\n\n{compared(timings, pairs(name))}"
        print(f"{job.title}, {job.micro_batches} micro-batches, {repetitions} rounds\n{shown}", flush=True)
        if options.write:
            title = job.title + AS_IT_STANDS
            picture = f"{PAGE.stem}-{name}{AS_IT_STANDS.replace(', ', '-').replace(' ', '-')}.png"
            figure(timings, f"{title}, {job.micro_batches} of them", PAGE.with_name(picture))
            body = (
                f"{job.micro_batches} micro-batches a window, Adam, float32 weights, on {ON}; "
                f"{repetitions} rounds.\n\n{shown}\n\n![times]({picture})\n\n"
                f"{circumstances('torch', 'accelerate', 'lightning')}.\n\n"
                f"    python benchmarks/torch_window.py {name} --repetitions {repetitions} --write\n"
            )
            section(PAGE, HEAD, title, body)


if __name__ == "__main__":
    main()
