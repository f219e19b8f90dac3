"""Accelerate prepares the model and the loader; bigbatch accumulates, in place of `accelerator.accumulate`.

torchrun --nproc-per-node 2 examples/torch_accelerate.py
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bigbatch.torch as bb

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
dataset = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))

# Even batches would give some examples to two ranks, which would count them twice.
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
model, loader = accelerator.prepare(
    nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)), DataLoader(dataset, batch_size=16, shuffle=True)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
loss_fn = nn.CrossEntropyLoss()

acc = bb.Accumulator(optimizer, every=8, clip_norm=1.0, model=model)
for epoch in range(10):
    for x, y in loader:
        acc.backward(loss_fn(model(x), y), items=len(x))  # was: accumulate, backward, clip, step, zero_grad
    update = acc.flush()
    accelerator.print(
        f"epoch {epoch:2d}  update {update.index:3d}  {update.items:.0f} examples  loss {update.loss:.4f}"
    )
accelerator.print(acc)
accelerator.end_training()
