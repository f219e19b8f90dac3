"""What the tests run in a rank, and the one process that they compare it with."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bigbatch.torch as bb
from bigbatch.torch import ranks as ranks_module

WORDS, WIDTH, LENGTH = 11, 6, 9
PAD = -100


def language_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Small, smooth, and with parameters of several sizes."""
    torch.manual_seed(0)
    layers = (
        nn.Embedding(WORDS, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, WORDS),
    )
    return nn.Sequential(*layers).to(dtype)


def texts(count: int, seed: int) -> list[torch.Tensor]:
    """Micro-batches of one to three texts of one to nine tokens, padded."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        rows = int(torch.randint(1, 4, (), generator=draw))
        tokens = torch.randint(WORDS, (rows, LENGTH), generator=draw)
        for row in tokens:
            row[int(torch.randint(2, LENGTH + 1, (), generator=draw)) :] = PAD
        made.append(tokens)
    return made


def tokens_in(tokens: torch.Tensor) -> int:
    return int((tokens[:, 1:] != PAD).sum())


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens to be predicted."""
    scores = model(tokens[:, :-1].clamp(min=0))
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def parameters(model: nn.Module) -> list[torch.Tensor]:
    """Whole tensors, whatever way they are kept."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in (q.detach() for q in model.parameters())]


def one_process(
    windows: list[list[torch.Tensor]], optimizer: Callable[..., Any], clip_norm: float | None = None
) -> tuple[list[torch.Tensor], list[tuple[int, float, float]]]:
    """The whole batch of each window in one piece: parameters, and (tokens, loss, gradient norm) of each."""
    model = language_model()
    step, seen = optimizer(model), []
    for window in windows:
        tokens = torch.cat(window)
        step.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm or float("inf"))
        step.step()
        seen.append((tokens_in(tokens), loss.item(), norm.item()))
    return parameters(model), seen


def stream(
    dealt: list[list[Any]], optimizer: Callable[..., Any], every: Any, options: dict[str, Any] | None = None
) -> tuple[list[torch.Tensor], list[bb.Update]]:
    """Trains on this rank's own micro-batches, and flushes where they end. None stands for a broken one."""
    model = DistributedDataParallel(language_model())
    acc = bb.Accumulator(optimizer(model), every=every, model=model, **(options or {}))
    updates = []
    for tokens in dealt[dist.get_rank()]:
        try:
            if tokens is None:
                raise OSError("a broken record")
            updates.append(acc.backward(loss_of(model, tokens), items=tokens_in(tokens)))
        except OSError:
            continue
    updates.append(acc.flush())
    return parameters(model), [u for u in updates if u is not None]


def split(dealt: list[list[torch.Tensor]], optimizer: Callable[..., Any], micro_batch: int) -> list[torch.Tensor]:
    """One update a window; of each, this rank holds its own texts, or none."""
    model = DistributedDataParallel(language_model())
    step, losses = optimizer(model), []
    for tokens in dealt[dist.get_rank()]:
        losses.append(
            bb.backward(lambda t: (loss_of(model, t), tokens_in(t)), tokens, micro_batch=micro_batch, model=model)
        )
        step.step()
        step.zero_grad()
    return [*parameters(model), torch.stack(losses)]


def twice(tokens_of: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two calls of the split door add up in `.grad`, as two backwards do; then the model reduces by itself again."""
    model = DistributedDataParallel(language_model())
    tokens = tokens_of[dist.get_rank()]
    for _ in range(2):
        bb.backward(lambda t: (loss_of(model, t), tokens_in(t)), tokens, micro_batch=2, model=model)
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (loss_of(model, tokens) * tokens_in(tokens)).backward()
    return ours, [p.grad.clone() for p in model.parameters()]


def poisoned(dealt: list[list[torch.Tensor]], where: int, nonfinite: str) -> tuple[list[Any], list[list[torch.Tensor]]]:
    """One rank's third micro-batch has a NaN in its loss."""
    model = DistributedDataParallel(language_model())
    acc = bb.Accumulator(sgd(model), every=2, model=model, nonfinite=nonfinite)
    updates, seen = [], [parameters(model)]
    for i, tokens in enumerate(dealt[dist.get_rank()]):
        loss = loss_of(model, tokens)
        if i == 2 and dist.get_rank() == where:
            loss = loss * float("nan")
        try:
            update = acc.backward(loss, items=tokens_in(tokens))
        except FloatingPointError as error:
            update = str(error)
        if update is not None:
            updates.append(update)
            seen.append([p.clone() for p in parameters(model)])
    return updates, seen


def autograd_error(dealt: list[list[torch.Tensor]], where: int) -> list[torch.Tensor]:
    """One rank's second backward raises; it drops what it had, and goes on."""
    model = DistributedDataParallel(language_model())
    acc = bb.Accumulator(sgd(model), every=3, model=model)

    def explode(_: torch.Tensor) -> None:
        raise OSError("inside autograd")

    for i, tokens in enumerate(dealt[dist.get_rank()]):
        loss = loss_of(model, tokens)
        if i == 1 and dist.get_rank() == where:
            loss.register_hook(explode)
        try:
            acc.backward(loss, items=tokens_in(tokens))
        except OSError:
            assert acc.pending == 0
    acc.flush()
    return parameters(model)


def split_error(where: int) -> Any:
    """One rank's loss_fn raises inside the split door."""
    model = DistributedDataParallel(language_model())
    tokens = texts(3, seed=1)[0]

    def loss_fn(t: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == where:
            raise OSError("a broken record")
        return loss_of(model, t)

    try:
        bb.backward(loss_fn, tokens, micro_batch=1, model=model)
    finally:
        assert all(p.grad is None for p in model.parameters())
        assert model.require_backward_grad_sync


def disagreeing(name: str) -> None:
    """Rank 1 is given something else."""
    odd = dist.get_rank() == 1
    model = language_model()
    frozen = name == "parameters" and odd
    ddp = DistributedDataParallel(model)
    if frozen:
        model[1].bias.requires_grad_(False)
    groups = list(model.parameters())[: -1 if name == "number" and odd else None]
    options: dict[str, Any] = {"every": 4}
    given = {"every": (4, bb.items(4)), "clip_norm": (None, 1.0), "dtype": (torch.float32, None)}
    if name in given:
        options[name] = given[name][odd]
    bb.Accumulator(torch.optim.SGD(groups, lr=0.1), model=ddp, **options)


def disagreeing_split() -> None:
    model = DistributedDataParallel(language_model(torch.bfloat16))
    dtype = torch.float32 if dist.get_rank() else torch.float64
    bb.backward(lambda t: loss_of(model, t), texts(1, seed=1)[0], micro_batch=1, model=model, dtype=dtype)


def refused(name: str) -> None:
    model = language_model()
    if name == "plain":
        bb.Accumulator(sgd(model), every=1, model=model)
    if name == "static":
        ddp = DistributedDataParallel(model, static_graph=True)
        bb.Accumulator(sgd(model), every=1, model=ddp)
    if name == "not a module":
        bb.Accumulator(sgd(model), every=1, model="ddp")
    if name == "strange":
        ddp, other = DistributedDataParallel(model), nn.Parameter(torch.ones((), dtype=torch.float64))
        bb.backward(lambda t: loss_of(ddp, t) * other, texts(1, seed=1)[0], micro_batch=1, model=ddp)


def averages(counts: list[int]) -> list[torch.Tensor]:
    """BatchNorm's running averages after some windows, on ranks with different numbers of micro-batches."""
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    for _ in range(counts[dist.get_rank()]):
        acc.backward(model(torch.randn(4, 3)).square().mean(), items=4)
    acc.flush()
    return [b.clone() for b in model.module.buffers()]


def overflowing(where: int) -> tuple[list[Any], float]:
    """A GradScaler, and one rank whose second window overflows."""
    model = DistributedDataParallel(language_model(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    acc = bb.Accumulator(sgd(model), every=2, model=model, scaler=scaler)
    updates = []
    for i, tokens in enumerate(texts(6, seed=dist.get_rank())):
        loss = loss_of(model, tokens)
        if i == 3 and dist.get_rank() == where:
            loss = loss + model.module[1].bias.sum() * 1e38 * 0.01
            loss.register_hook(lambda g: g * 1e38)
        updates.append(acc.backward(loss, items=tokens_in(tokens)))
    return [u.skipped for u in updates if u], scaler.get_scale()


def half(every: int) -> list[torch.Tensor]:
    """bfloat16 parameters: the mean gradient that the optimizer is given, on each rank."""
    model = DistributedDataParallel(language_model(torch.bfloat16))
    optimizer, given = torch.optim.SGD(model.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: given.extend(p.grad.clone() for p in model.parameters()))
    acc = bb.Accumulator(optimizer, every=every, model=model)
    for tokens in texts(every, seed=dist.get_rank()):
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return given


class Wire(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the collectives and their bytes, as c10d's operators see them."""

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.sent.append((func.overloadpacket.__name__, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


@contextmanager
def buckets_of(size: int) -> Iterator[None]:
    before = ranks_module.BUCKET
    ranks_module.BUCKET = size
    try:
        yield
    finally:
        ranks_module.BUCKET = before


def wire(every: int, bucket: int, plain: bool) -> list[tuple[str, int]]:
    """What one window puts on the wire; `plain` is DistributedDataParallel's own loop."""
    model = DistributedDataParallel(language_model(), bucket_cap_mb=bucket / 2**20)
    optimizer = sgd(model)
    with buckets_of(bucket):
        acc = None if plain else bb.Accumulator(optimizer, every=every, model=model)
        with Wire() as seen:
            for tokens in texts(every, seed=dist.get_rank()):
                if acc is None:
                    (loss_of(model, tokens) / every).backward()
                else:
                    acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return seen.sent


def saved_inside(place: int) -> tuple[Any, int]:
    model = DistributedDataParallel(language_model())
    acc = bb.Accumulator(sgd(model), every=4, model=model)
    for tokens in texts(place, seed=dist.get_rank()):
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return acc.state_dict(), acc.index


def loads(state: Any) -> int:
    model = DistributedDataParallel(language_model())
    acc = bb.Accumulator(sgd(model), every=4, model=model)
    acc.load_state_dict(state)
    return acc.index


def survivor() -> None:
    """Feeds windows until its partner is gone."""
    model = DistributedDataParallel(language_model())
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    for tokens in texts(10_000, seed=dist.get_rank()):
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
        if dist.get_rank() == 1 and acc.index == 2 and acc.pending == 1:
            os._exit(9)
