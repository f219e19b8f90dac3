"""What the tests of chunked functions run in a rank, and the one process that they compare it with."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import bigbatch.torch as bb

F64 = torch.float64


class Towers(nn.Module):
    """Two encoders and a temperature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.double()

    def forward(self, x, y):
        return self.a(x), self.b(y)


def info_nce(a, b, scale):
    logits = scale.exp() * F.normalize(a) @ F.normalize(b).T
    places = torch.arange(len(a))
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


def siglip(a, b, scale):
    signs = 2 * torch.eye(len(a), dtype=a.dtype) - 1
    return -F.logsigmoid(signs * (scale.exp() * F.normalize(a) @ F.normalize(b).T - 1)).mean()


LOSSES = {"info_nce": info_nce, "siglip": siglip}


def pairs(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(2, rows, 5, dtype=F64, generator=torch.Generator().manual_seed(seed))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def one_process(windows: list[list[torch.Tensor]], loss: str) -> list[torch.Tensor]:
    """Each window is the mean loss of its batches, of which each is of all ranks."""
    model = Towers()
    optimizer = sgd(model)
    for window in windows:
        optimizer.zero_grad()
        total = sum(LOSSES[loss](*model(*batch), model.scale) for batch in window) / len(window)
        total.backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def chunked(loss: str, every: int, closes: bool, mine: list[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
    """Parameters after the windows, and how many updates there were; the function may close over the model."""
    ddp = DistributedDataParallel(Towers())
    encode = bb.chunked((lambda x, y: ddp(x, y)) if closes else ddp, micro_batch=2)
    acc = bb.Accumulator(sgd(ddp), every=every, model=ddp)
    for batch in mine:
        a, b = (bb.gathered(rows) for rows in encode(*batch))
        acc.backward(LOSSES[loss](a, b, ddp.module.scale), items=1)
    return [p.detach() for p in ddp.parameters()], acc.index


def gradients_of_gathered(mine: torch.Tensor, labels: torch.Tensor) -> Any:
    """Each rank's own loss of the rows of all, differentiated everywhere at once."""
    x = mine.clone().requires_grad_()
    rows = bb.gathered(x)
    (rows.square().sum() * (dist.get_rank() + 1)).backward()
    return rows.detach(), x.grad, bb.gathered(labels)


def refused(name: str) -> None:
    model = Towers()
    if name == "fully_shard":
        bb.chunked(fully_shard(model.a), micro_batch=2)(pairs(4, 0)[0])
    if name == "shards inside":
        fully_shard(model.a)
        bb.chunked(lambda x: model.a(x), micro_batch=2)(pairs(4, 0)[0])
    if name == "nobody reduces":
        bb.chunked(DistributedDataParallel(model), micro_batch=2)(*pairs(4, 0))
    if name == "nobody reduces inside":
        ddp = DistributedDataParallel(model)
        bb.chunked(lambda x, y: ddp(x, y), micro_batch=2)(*pairs(4, 0))
    if name == "shapes":
        bb.gathered(torch.zeros(2, 3 + dist.get_rank()))
    if name == "dtypes":
        bb.gathered(torch.zeros(2, 3, dtype=(F64, torch.float32)[dist.get_rank()]))
    if name == "scalar":
        bb.gathered(torch.zeros(()))


def without_gradients() -> list[torch.Tensor]:
    with torch.no_grad():
        return bb.chunked(DistributedDataParallel(Towers()), micro_batch=2)(*pairs(5, 0))
