"""Two ranks on one machine: a window of 16 against the loops one writes by hand, what goes over the wire, and kills.

python benchmarks/ranks.py times      a window, its reductions and bytes
python benchmarks/ranks.py kills      `kill -9` at twenty random points, restarts, and the weights at the end
python benchmarks/ranks.py --write    both, into benchmarks/ranks.md
"""

import argparse
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from interleaved import circumstances, measure, section, table
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch.torch as bb

N, MICRO_BATCH, WIDTH = 16, 16, 1024
HERE = Path(__file__).parent
BY_HAND, EVERY_TIME, STREAM, SPLIT = "no_sync by hand", "DDP as it is", "ours, stream", "ours, split"
FSDP_BY_HAND, FSDP_WINDOW, FSDP_MICRO = "FSDP2 by hand", 'FSDP2, ours, "window"', 'FSDP2, ours, "micro_batch"'


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10)
    )  # fmt: skip


class Wire(TorchDispatchMode):
    """Counts the collectives that move gradients, and their bytes."""

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name in ("allreduce_", "_reduce_scatter_base_"):
            tensors = args[0] if name == "allreduce_" else [args[1]]
            self.sent.append((name, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def contenders(x, y):
    """Each makes one window and steps; all of them clip, and read the loss."""
    micro_batches = list(zip(x.split(MICRO_BATCH), y.split(MICRO_BATCH), strict=True))

    def parts(shard=False):
        model = network()
        if shard:
            for layer in (model[0], model[2], model[4], model):
                fully_shard(layer)
        else:
            model = DistributedDataParallel(model)
        return model, torch.optim.Adam(model.parameters())

    def step(model, optimizer, total):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    def by_hand(sync_always):
        model, optimizer = parts()

        def run():
            total = torch.zeros(())
            for i, (x_, y_) in enumerate(micro_batches):
                model.require_backward_grad_sync = sync_always or i == N - 1
                loss = F.cross_entropy(model(x_), y_) / N
                loss.backward()
                total += loss.detach()
            step(model, optimizer, total)

        return run

    def fsdp_by_hand():
        model, optimizer = parts(shard=True)

        def run():
            total = torch.zeros(())
            for i, (x_, y_) in enumerate(micro_batches):
                model.set_requires_gradient_sync(i == N - 1)
                loss = F.cross_entropy(model(x_), y_) / N
                loss.backward()
                total += loss.detach()
            step(model, optimizer, total)

        return run

    def stream(shard=False, **options):
        model, optimizer = parts(shard)
        acc = bb.Accumulator(optimizer, every=N, clip_norm=1.0, model=model, **options)

        def run():
            for x_, y_ in micro_batches:
                acc.backward(F.cross_entropy(model(x_), y_), items=MICRO_BATCH)

        return run

    def split():
        model, optimizer = parts()

        def run():
            total = bb.backward(
                lambda b: F.cross_entropy(model(b[0]), b[1]), (x, y), micro_batch=MICRO_BATCH, model=model
            )
            step(model, optimizer, total)

        return run

    return {
        BY_HAND: by_hand(False), EVERY_TIME: by_hand(True), STREAM: stream(), SPLIT: split(),
        FSDP_BY_HAND: fsdp_by_hand(), FSDP_WINDOW: stream(True), FSDP_MICRO: stream(True, sync="micro_batch"),
    }  # fmt: skip


def rank_main(rank, rendezvous, repetitions, pipe):
    """One rank: the same contenders in the same order as the other."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    x, y = torch.randn(N * MICRO_BATCH, 784), torch.randint(10, (N * MICRO_BATCH,))
    runs = contenders(x, y)
    timings = measure(runs, repetitions)
    sent = {}
    for name, run in runs.items():
        with Wire() as wire:
            run()
        sent[name] = [size for _, size in wire.sent if size > 4096]  # the rest are counts and norms
    dist.barrier()
    pipe.send((timings, sent))
    dist.destroy_process_group()


def race(repetitions):
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            arguments = (rank, os.path.join(folder, "rendezvous"), repetitions, theirs)
            processes.append(context.Process(target=rank_main, args=arguments))
            processes[-1].start()
            pipes.append(ours)
        (timings, sent), _ = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return timings, sent


def torchrun(restarts, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        "--max-restarts",
        str(restarts),
        "--monitor-interval",
        "0.1",
        str(HERE.parent / "examples/torch_ddp.py"),
    ]
    # torchrun 2.13 otherwise gives restarted ranks the store of the last start, with the addresses of dead ranks in it.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([*command, *arguments], env=environment, **pipes)


def kills(times, epochs, seed):
    """Kills a rank of the example at random points; whether the weights at the end are the undisturbed run's."""
    undisturbed, _ = torchrun(0, "--epochs", str(epochs)).communicate()
    draw, before, updates = random.Random(seed), set(), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "digits.pt"
        process = torchrun(times + 2, "--epochs", str(epochs), "--checkpoint", str(checkpoint))

        def ranks():
            command = ["pgrep", "-P", str(process.pid), "-f", " -u .*torch_ddp.py"]
            return set(subprocess.run(command, capture_output=True, text=True).stdout.split())

        while len(updates) < times and process.poll() is None:
            seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            time.sleep(0.05)
            # Both ranks of a new start, and an update of theirs.
            if len(ranks() - before) < 2 or not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen:
                continue
            time.sleep(draw.random() / 5)
            before = ranks()
            if subprocess.run(["kill", "-9", draw.choice(sorted(before))]).returncode == 0:
                updates.append(torch.load(checkpoint, weights_only=True)["acc"]["index"])
        disturbed, _ = process.communicate()
    same = disturbed.splitlines()[-1:] == undisturbed.splitlines()[-1:] != []
    return updates, same, undisturbed.splitlines()[-1]


HEAD = "# PyTorch on several ranks"
PARTS = ["times", "kills"]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help=f"some of {PARTS}; both without")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the points at which ranks are killed")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):  # Python 3.11 finds no parts at all outside any `choices`
        parser.error(f"unknown parts {sorted(unknown)}; there are {PARTS}")
    for part in args.parts or PARTS:
        if part == "times":
            (title, body), given = times(args.repetitions), f"--repetitions {args.repetitions}"
        else:
            title, body = killed(args.kills, args.epochs, args.seed)
            given = f"--kills {args.kills} --epochs {args.epochs} --seed {args.seed}"
        body += f"\n\n{circumstances('torch')}.\n\n    python benchmarks/ranks.py {part} {given} --write"
        print(f"## {title}\n\n{body}\n", flush=True)
        if args.write:
            section(HERE / "ranks.md", HEAD, title, body)


def times(repetitions):
    timings, sent = race(repetitions)
    reductions = {
        "reductions": {name: str(len(sizes)) for name, sizes in sent.items()},
        "MB": {name: f"{sum(sizes) / 1e6:.1f}" for name, sizes in sent.items()},
    }
    ddp = {name: timing for name, timing in timings.items() if "FSDP2" not in name}
    fsdp = {name: timing for name, timing in timings.items() if "FSDP2" in name}
    body = [
        f"Two gloo ranks on one CPU, one thread each. A window is {N} micro-batches of {MICRO_BATCH} on each rank: "
        f"MLP 784-{WIDTH}-{WIDTH}-10, Adam, float32, clipped. Every contender once a round, in an order drawn anew; a "
        f"ratio is the median over rounds of both times in one round. {repetitions} rounds. Reductions of gradients, "
        "and their bytes, are those of one window on one rank, as c10d's operators see them.",
        table(ddp, [BY_HAND], reductions),
        table(fsdp, [FSDP_BY_HAND], reductions),
    ]
    return "A window of 16", "\n\n".join(body)


def killed(times, epochs, seed):
    updates, same, weights = kills(times, epochs, seed)
    body = (
        f"`examples/torch_ddp.py --epochs {epochs}` under `torchrun --max-restarts`, and `kill -9` of one of its two "
        f"ranks {len(updates)} times, each at a random point after that start had made an update. The checkpoint then "
        f"held {', '.join(map(str, updates))} updates. At the end the weights were "
        f"{'the same' if same else 'NOT the same'}, to the last bit of their sum, as the undisturbed run's ({weights})."
    )
    return "Killed", body


if __name__ == "__main__":
    main()
