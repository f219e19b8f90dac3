"""PyTorch's windows for `growth.py`."""

import torch
import torch.nn.functional as F
from torch_jobs import DEVICE, ON, digits, mlp, peak, timed

import bigbatch.torch as bb

__all__ = ["ON", "PACKAGES", "peaks", "windows"]
PACKAGES = ["torch"]


def windows(width, n, size=16):
    """One window of each way, that keeps its own time."""
    x, y = (t.to(DEVICE) for t in digits(n * size))

    def split(model, optimizer):
        bb.backward(lambda part: F.cross_entropy(model(part[0]), part[1]), (x, y), micro_batch=size)
        optimizer.step()
        optimizer.zero_grad()

    def stream(model, optimizer):
        acc = bb.Accumulator(optimizer, every=n)
        for a, b in zip(x.split(size), y.split(size), strict=True):
            acc.backward(F.cross_entropy(model(a), b), items=len(a))

    def by_hand(model, optimizer):
        for a, b in zip(x.split(size), y.split(size), strict=True):
            (F.cross_entropy(model(a), b) / n).backward()
        optimizer.step()
        optimizer.zero_grad()

    def made(way):
        torch.manual_seed(0)
        model = mlp(width).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return timed(lambda: way(model, optimizer))

    return {"by hand": made(by_hand), "ours, stream": made(stream), "ours, split": made(split)}


def peaks(points):
    """Bytes of each way at some (width, micro-batches)."""
    found = []
    for point in points:
        runs = windows(*point)
        for run in runs.values():
            run()
        found.append({name: peak(run) for name, run in runs.items()})
    return found
