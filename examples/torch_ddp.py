r"""Several ranks: each reads its own part of the data, and the ranks' micro-batches make one exact update together.

torchrun --nproc-per-node 2 examples/torch_ddp.py
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 3 examples/torch_ddp.py \
    --checkpoint /tmp/digits.pt

With a checkpoint a run that is killed goes on from the last update, and ends with the same weights. On GPUs: "nccl",
torch.cuda.set_device(local_rank), and model and data on that device.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bigbatch.torch as bb

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--checkpoint", type=Path)
args = parser.parse_args()

dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # how long ranks wait for one that hangs
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)

model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loss_fn = nn.CrossEntropyLoss()
acc = bb.Accumulator(optimizer, every=8, clip_norm=1.0, model=model)

first_epoch, done = 0, 0  # the place in the data: an epoch, and this rank's micro-batches of it
if args.checkpoint and args.checkpoint.exists():
    state = torch.load(args.checkpoint, weights_only=True)
    for part, saved in ((model.module, "model"), (optimizer, "optimizer"), (acc, "acc")):
        part.load_state_dict(state[saved])
    first_epoch, done = state["epoch"], state["done"]


def save(epoch: int, done: int) -> None:
    """All ranks are alike after an update, so one of them writes; a half-written file never has the name."""
    if rank == 0 and args.checkpoint:
        parts = {"model": model.module, "optimizer": optimizer, "acc": acc}
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "epoch": epoch, "done": done}, args.checkpoint.with_suffix(".part"))
        os.replace(args.checkpoint.with_suffix(".part"), args.checkpoint)


for epoch in range(first_epoch, args.epochs):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
    # The ranks' parts differ in length, by an example and so by a micro-batch. Nothing is dropped or read twice.
    micro_batches, updates = order[rank::ranks].split(16), []
    for i, rows in enumerate(micro_batches):
        if i < done:
            continue
        if update := acc.backward(loss_fn(model(x[rows]), y[rows]), items=len(rows)):
            updates.append(update)
            save(epoch, i + 1)
    done = 0
    if update := acc.flush():  # waits for the ranks that have more, and makes the epoch's last update with them
        updates.append(update)
    save(epoch + 1, 0)
    if rank == 0 and updates:
        examples = sum(update.items for update in updates)
        loss = sum(update.items * update.loss for update in updates) / examples
        print(f"epoch {epoch:2d}  {len(updates)} updates  {examples:.0f} examples  loss {loss:.4f}", flush=True)

if rank == 0:
    digest = torch.stack([p.detach().double().sum() for p in model.parameters()]).sum().item()
    print(f"{acc}\nsum of the weights {digest!r}", flush=True)
dist.destroy_process_group()
