"""Prints what a window was predicted to need, what the process then grew by, and what the prediction took.

python peak_of_a_window.py mlp|transformer|convnet MICRO_BATCH MICRO_BATCHES
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb
from bigbatch.torch.plan import _dry_runs

sys.path.append(str(Path(__file__).parents[1]))  # appended: folders there have the frameworks' names
from process_memory import growth, status


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(128, 1000)

    def forward(self, x):
        return self.head(self.layers(self.embedding(x))).flatten(0, 1)


def job(name, length):
    """A model and a batch."""
    torch.manual_seed(0)
    if name == "mlp":
        model = nn.Sequential(nn.Linear(784, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10))
        return model, torch.randn(length, 784), torch.randint(10, (length,))
    if name == "transformer":
        return Transformer(), torch.randint(1000, (length, 64)), torch.randint(1000, (length, 64))
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.GELU(), nn.Conv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return model, torch.randn(length, 3, 32, 32), torch.randint(10, (length,))


def main(name, micro_batch, micro_batches):
    model, x, y = job(name, micro_batch * micro_batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(batch):
        return F.cross_entropy(model(batch[0]), batch[1].flatten())

    before, started = status("VmRSS"), time.process_time()
    needs = _dry_runs(loss_fn, (x, y), len(x), torch.float32).needs(micro_batch)
    seconds, grown = time.process_time() - started, status("VmRSS") - before

    # One small window, so that what PyTorch makes at its first operations is there.
    bb.backward(loss_fn, (x[:2], y[:2]), micro_batch=1)
    optimizer.zero_grad()
    peak = growth(lambda: bb.backward(loss_fn, (x, y), micro_batch=micro_batch))
    print(needs, peak, seconds, grown)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
