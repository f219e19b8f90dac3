"""Two towers: each picture's upper half finds its lower half among all of the batch, with 32 pairs in memory at a time.

The contrastive loss compares every pair with every other. So no sum over micro-batches is its gradient. `chunked` gives
it that of the whole batch.

python examples/torch_clip.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bigbatch.torch as bb

torch.manual_seed(0)
pixels, _ = load_digits(return_X_y=True)
halves = torch.tensor(pixels / 16, dtype=torch.float32).split(32, dim=1)
loader = DataLoader(TensorDataset(*halves), batch_size=512, shuffle=True, drop_last=True)


def tower() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 32))


upper, lower, scale = tower(), tower(), nn.Parameter(torch.tensor(2.0))
optimizer = torch.optim.AdamW([*upper.parameters(), *lower.parameters(), scale], lr=3e-3)
encode_upper = bb.chunked(upper, micro_batch=32)
encode_lower = bb.chunked(lower, micro_batch=32)


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    logits = scale.exp() * F.normalize(a) @ F.normalize(b).T
    places = torch.arange(len(a))
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


for epoch in range(20):
    loss = torch.zeros(())
    for above, below in loader:
        optimizer.zero_grad()
        loss = info_nce(encode_upper(above), encode_lower(below))  # was: info_nce(upper(above), lower(below))
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch:2d}  loss {loss.item():.4f}")
