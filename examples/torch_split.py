"""Split: batches of 1,024 as they are, with the activations of 32 examples in memory at a time.

python examples/torch_split.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bigbatch.torch as bb

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
dataset = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
loader = DataLoader(dataset, batch_size=1024, shuffle=True)

model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_fn(batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


loss = torch.zeros(())
for epoch in range(20):
    for batch in loader:
        optimizer.zero_grad()
        loss = bb.backward(loss_fn, batch, micro_batch=32)  # was: loss_fn(batch).backward()
        optimizer.step()
    print(f"epoch {epoch:2d}  loss {loss:.4f}")
