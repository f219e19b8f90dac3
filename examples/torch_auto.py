"""A batch of 4,096 pictures on whatever memory there is: `micro_batch="auto"` finds the micro-batch that fits.

In 2 GiB of memory it trains, where the whole batch at once raises an out-of-memory error:

    (ulimit -v 2097152; OMP_NUM_THREADS=1 python examples/torch_auto.py)
    (ulimit -v 2097152; OMP_NUM_THREADS=1 python examples/torch_auto.py --micro-batch 4096)
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb

parser = argparse.ArgumentParser()
parser.add_argument("--micro-batch", default="auto", help="examples in memory at once, or auto")
parser.add_argument("--updates", type=int, default=2)
options, _ = parser.parse_known_args()
micro_batch = options.micro_batch if options.micro_batch == "auto" else int(options.micro_batch)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1),
    nn.GroupNorm(4, 16),
    nn.GELU(),
    nn.Conv2d(16, 16, 3, padding=1),
    nn.GELU(),
    nn.AdaptiveAvgPool2d(4),
    nn.Flatten(),
    nn.Linear(256, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_fn(batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


for update in range(options.updates):
    # In place of a data loader: random pictures, each class a little brighter than the one before.
    labels = torch.randint(10, (4096,))
    images = torch.randn(4096, 3, 32, 32) + labels[:, None, None, None] / 10
    loss = bb.backward(loss_fn, (images, labels), micro_batch=micro_batch)
    optimizer.step()
    optimizer.zero_grad()
    print(f"update {update + 1} of {options.updates}: loss {loss:.4f}", flush=True)
