"""Is accumulation exact for this model, and is a larger batch worth it? PyTorch, on scikit-learn's digits.

python examples/torch_honest.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import bigbatch.torch as bb

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)

# Exact? With a BatchNorm it is not; with a LayerNorm in its place it is.
for norm in (nn.BatchNorm1d(64), nn.LayerNorm(64)):
    model = nn.Sequential(nn.Linear(64, 64), norm, nn.Tanh(), nn.Linear(64, 10))
    print(bb.audit(lambda batch, model=model: F.cross_entropy(model(batch[0]), batch[1]), model, (x[:30], y[:30]),
                   micro_batch=8), end="\n\n")  # fmt: skip

# Worth it? 64 × 16 measures its own noise.
acc = bb.Accumulator(torch.optim.AdamW(model.parameters(), lr=1e-3), every=64, noise=1)
for _ in range(20):
    for rows in torch.randperm(len(x)).split(16):
        acc.backward(F.cross_entropy(model(x[rows]), y[rows]), items=len(rows))
acc.flush()
print("noise scale:", acc.noise_scale)
print(bb.advice(acc.noise_scale, batch=1024, micro_batch=16, beta2=0.999))

# Windows that close when the gradient is known well enough.
acc = bb.Accumulator(torch.optim.AdamW(model.parameters(), lr=1e-3), every=bb.until_noise(eta=1.0, at_most=64))
sizes = []
for rows in torch.randperm(len(x)).split(16):
    if update := acc.backward(F.cross_entropy(model(x[rows]), y[rows]), items=len(rows)):
        sizes.append(update.micro_batches)
print("windows of", sizes)
