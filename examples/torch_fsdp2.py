r"""FSDP2: parameters, gradients and optimizer states spread over the ranks, and windows as with one process.

torchrun --nproc-per-node 2 examples/torch_fsdp2.py
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 2 --max-restarts 3 examples/torch_fsdp2.py \
    --checkpoint /tmp/digits

With a checkpoint every epoch ends with one, by torch.distributed.checkpoint; any number of ranks goes on from it. On
GPUs: "cpu:gloo,cuda:nccl", torch.cuda.set_device(local_rank), and model and data on that device.
"""

import argparse
import io
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import bigbatch.torch as bb

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--sync", choices=["window", "micro_batch"], default="window")
parser.add_argument("--checkpoint", type=Path)
args = parser.parse_args()

dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # how long ranks wait for one that hangs
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)

model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
for layer in (model[0], model[2], model):
    fully_shard(layer)  # bfloat16: mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loss_fn = nn.CrossEntropyLoss()
acc = bb.Accumulator(optimizer, every=5, clip_norm=1.0, model=model, sync=args.sync)


def state() -> dict[str, Any]:
    held, optimizers = get_state_dict(model, optimizer)
    return {"model": held, "optimizer": optimizers, "acc": b"", "epoch": 0}


first_epoch, saved = 0, sorted(args.checkpoint.glob("*/.metadata")) if args.checkpoint else []
if saved:
    loaded = state()
    load(loaded, checkpoint_id=saved[-1].parent)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    acc.load_state_dict(torch.load(io.BytesIO(loaded["acc"]), weights_only=True))
    first_epoch = loaded["epoch"]

for epoch in range(first_epoch, args.epochs):
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
    updates = []
    for rows in acc.join(order.split(24)[rank::ranks]):  # one rank has one more, and every forward needs all
        if update := acc.backward(loss_fn(model(x[rows]), y[rows]), items=len(rows)):
            updates.append(update)
    if update := acc.flush():
        updates.append(update)
    if rank == 0:
        examples = sum(update.items for update in updates)
        loss = sum(update.items * update.loss for update in updates) / examples
        print(f"epoch {epoch:2d}  {len(updates)} updates  {examples:.0f} examples  loss {loss:.4f}", flush=True)
    if args.checkpoint:
        torch.save(acc.state_dict(), file := io.BytesIO())
        done = {**state(), "acc": file.getvalue(), "epoch": epoch + 1}
        save(done, checkpoint_id=args.checkpoint / f"{epoch + 1:04d}")  # .metadata is written last

sums = [p.detach().double().sum() for p in model.parameters()]
digest = torch.stack([s.full_tensor() for s in sums if isinstance(s, DTensor)]).sum().item()
if rank == 0:
    print(f"{acc}\nsum of the weights {digest!r}", flush=True)
dist.destroy_process_group()
