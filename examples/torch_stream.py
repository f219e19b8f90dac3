"""Stream: a loader yields micro-batches of 16, and every 64 of them make one update.

python examples/torch_stream.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bigbatch.torch as bb

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
dataset = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
loader = DataLoader(dataset, batch_size=16, shuffle=True)

model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)  # 40 updates, not 2,260 micro-batches
loss_fn = nn.CrossEntropyLoss()

acc = bb.Accumulator(optimizer, every=64, clip_norm=1.0, scheduler=scheduler)
for epoch in range(20):
    for x, y in loader:
        update = acc.backward(loss_fn(model(x), y), items=len(x))
        if update:
            print(f"epoch {epoch:2d}  update {update.index:2d}  {update.items:.0f} examples  loss {update.loss:.4f}")
    tail = acc.flush()  # the last 49 micro-batches of the epoch are a window of their own
    if tail:
        print(f"epoch {epoch:2d}  update {tail.index:2d}  {tail.items:.0f} examples  loss {tail.loss:.4f}")
print(acc)
