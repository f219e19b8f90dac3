"""Accelerate prepares the model and the loader; bigbatch accumulates, in place of `accelerator.accumulate`.

Where that loop is to stay, see accelerate_accumulate.py.

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
    updates = []
    for x, y in loader:
        # In place of accumulate, backward, clip_grad_norm_, step and zero_grad.
        if update := acc.backward(loss_fn(model(x), y), items=len(x)):
            updates.append(update)
    if update := acc.flush():
        updates.append(update)
    examples = sum(update.items for update in updates)
    loss = sum(update.items * update.loss for update in updates) / examples
    accelerator.print(f"epoch {epoch:2d}  {len(updates)} updates  {examples:.0f} examples  loss {loss:.4f}")
accelerator.print(acc)
accelerator.end_training()
