"""What the tests run in a rank, and the one process that they compare it with."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bigbatch.torch as bb
from bigbatch.engines.torch_fsdp import whole
from bigbatch.fused import torch_limits
from bigbatch.torch import collectives, ddp

WORDS, WIDTH, LENGTH = 11, 6, 9
PAD = -100


@contextmanager
def setting(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


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


def lengths_of(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens != PAD).sum(1)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens to be predicted."""
    scores = model(tokens[:, :-1].clamp(min=0))
    return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0)


def parameters(model: nn.Module) -> list[torch.Tensor]:
    """Whole tensors, whatever way they are kept."""
    return [whole(p.detach()) for p in model.parameters()]


def wrapped(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The model as "ddp", or sharded and synchronized as in "fsdp window" or "hsdp micro_batch"; and what to pass."""
    model = language_model(dtype)
    if kind == "ddp":
        return DistributedDataParallel(model), {}
    way, sync = kind.split()
    size = dist.get_world_size()
    if way == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    narrow = dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if narrow else MixedPrecisionPolicy()
    for layer in (model[1], model[4], model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return model, {"sync": sync}


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
    options = dict(options or {})
    model, given = wrapped(options.pop("kind", "ddp"))
    fused_from, join = options.pop("fused_from", 1 << 17), options.pop("join", False)
    acc = bb.Accumulator(optimizer(model), every=every, model=model, **given, **options)
    updates, mine = [], dealt[dist.get_rank()]
    for tokens in acc.join(mine) if join else mine:
        try:
            if tokens is None:
                raise OSError("a broken record")
            with setting(torch_limits, "LIMITS", torch_limits.LIMITS._replace(cpu_elements=fused_from)):
                updates.append(acc.backward(loss_of(model, tokens), items=tokens_in(tokens)))
        except OSError:
            continue
    updates.append(acc.flush())
    return parameters(model), [u for u in updates if u is not None]


def trainer(
    dealt: list[list[torch.Tensor]], every: int, closed_by: str, kind: str
) -> tuple[list[torch.Tensor], list[bb.Update]]:
    """A loop that clips and steps itself. The window is closed by its "count", or by the "caller"."""
    model, given = wrapped(kind)
    optimizer = adamw(model)
    grads = bb.Gradients(model.parameters(), every if closed_by == "count" else None, model=model, **given)
    updates = []

    def apply(update: bb.Update) -> None:
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        assert abs(norm - update.grad_norm) < 1e-12
        optimizer.step()
        if update.index % 2:
            optimizer.zero_grad()
        updates.append(update)

    for k, tokens in enumerate(dealt[dist.get_rank()]):
        last = closed_by == "caller" and (k + 1) % every == 0
        if update := grads.backward(loss_of(model, tokens), items=tokens_in(tokens), last=last):
            apply(update)
    while update := grads.flush():
        apply(update)
    return parameters(model), updates


def split(
    dealt: list[list[torch.Tensor]], optimizer: Callable[..., Any], micro_batch: Any, kind: str = "ddp"
) -> list[torch.Tensor]:
    """One update a window; of each, this rank holds its own texts, or none."""
    model, given = wrapped(kind)
    step, losses = optimizer(model), []

    def loss_fn(t: torch.Tensor) -> tuple[torch.Tensor, int]:
        return loss_of(model, t), tokens_in(t)

    for tokens in dealt[dist.get_rank()]:
        losses.append(bb.backward(loss_fn, tokens, micro_batch=micro_batch, model=model, **given))
        step.step()
        step.zero_grad()
    return [*parameters(model), torch.stack(losses)]


def automatic(tokens_of: list[torch.Tensor], where: int) -> tuple[list[torch.Tensor], list[int]]:
    """One update by the micro-batch that fits; on one rank the backward of more than two texts does not after all."""
    model, sizes = DistributedDataParallel(language_model()), []

    def full(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory, as a test wants it")

    def loss_fn(t: torch.Tensor) -> tuple[torch.Tensor, Any]:
        loss = loss_of(model, t)
        if not isinstance(t, FakeTensor):
            sizes.append(len(t))
            if dist.get_rank() == where and len(t) > 2:
                loss.register_hook(full)
        return loss, (t[:, 1:] != PAD).sum()

    step = sgd(model)
    loss = bb.backward(loss_fn, tokens_of[dist.get_rank()], micro_batch="auto", model=model)
    step.step()
    return [*parameters(model), loss], sizes


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


def poisoned(
    dealt: list[list[torch.Tensor]], where: int, nonfinite: str, kind: str = "ddp"
) -> tuple[list[Any], list[list[torch.Tensor]]]:
    """One rank's third micro-batch has a NaN in its loss."""
    model, given = wrapped(kind)
    acc = bb.Accumulator(sgd(model), every=2, model=model, nonfinite=nonfinite, **given)
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
    if name == "noise":
        bb.Accumulator(sgd(model), every=bb.until_noise(at_most=4), model=DistributedDataParallel(model))
    if name == "auto":
        fully_shard(model)
        bb.backward(lambda t: loss_of(model, t), texts(1, seed=1)[0], micro_batch="auto", model=model)
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


def sent_and_gone() -> bool:
    """Whether all that a window handed to gloo is gone, though its gradients are not: dense, of rows, and buffers."""
    layers = nn.Embedding(WORDS, WIDTH, sparse=True), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)
    model = DistributedDataParallel(nn.Sequential(*layers))
    bb.backward(lambda tokens: model(tokens).square().mean(), torch.arange(8), micro_batch=4, model=model)
    collectives._wait_for_gloo(seconds=30)
    return all(p.grad is not None for p in model.parameters()) and len(collectives._SENT) == 0


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


def half(every: int, kind: str = "ddp") -> list[torch.Tensor]:
    """bfloat16 parameters: the mean gradient that the optimizer is given, on each rank."""
    model, given = wrapped(kind, torch.bfloat16)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(whole(p.grad).clone() for p in model.parameters()))
    acc = bb.Accumulator(optimizer, every=every, model=model, **given)
    for tokens in texts(every, seed=dist.get_rank()):
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return seen


class Wire(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the collectives and their bytes, as c10d's operators see them."""

    def __init__(self):
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = args[1] if func.overloadpacket.__name__ == "allgather_" else args[0]
            tensors = sent if isinstance(sent, list) else [sent]
            self.sent.append((func.overloadpacket.__name__, sum(t.numel() * t.element_size() for t in tensors)))
        return func(*args, **(kwargs or {}))


def wire(every: int, bucket: int, kind: str = "ddp", flush: bool = False) -> list[tuple[str, int]]:
    """What one window puts on the wire, closed by its last micro-batch or early."""
    model, given = wrapped(kind)
    with setting(ddp, "BUCKET", bucket):
        acc = bb.Accumulator(sgd(model), every=every + flush, model=model, **given)
        for _ in range(2):  # FSDP is not itself before its first forward is over
            with Wire() as seen:
                for tokens in texts(every, seed=dist.get_rank()):
                    acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
                if flush:
                    acc.flush()
    return seen.sent


def resumed(dealt: list[list[torch.Tensor]], place: int, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters of a run without a stop, and of one saved and loaded anew after `place` micro-batches; 3 a window."""
    mine, ends = dealt[dist.get_rank()], []
    for stops in ((), (place,)):
        model, given = wrapped(kind)
        optimizer = adamw(model)
        acc = bb.Accumulator(optimizer, every=3, model=model, **given)
        for i, tokens in enumerate(mine):
            if i in stops:
                file = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict(), acc.state_dict()), file)
                file.seek(0)
                model, _ = wrapped(kind)
                optimizer = adamw(model)
                acc = bb.Accumulator(optimizer, every=3, model=model, **given)
                for part, state in zip((model, optimizer, acc), torch.load(file, weights_only=False), strict=True):
                    part.load_state_dict(state)
            acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
        acc.flush()
        ends.append(parameters(model))
    return ends[0], ends[1]


def flushed_at_once(dealt: list[list[torch.Tensor]], kind: str) -> list[torch.Tensor]:
    """Loads a window of two micro-batches, and flushes before any forward."""
    mine = dealt[dist.get_rank()]
    model, given = wrapped(kind)
    acc = bb.Accumulator(sgd(model), every=3, model=model, **given)
    for tokens in mine:
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    state = acc.state_dict()
    model, _ = wrapped(kind)
    acc = bb.Accumulator(sgd(model), every=3, model=model, **given)
    acc.load_state_dict(state)
    acc.flush()
    return parameters(model)


def distributed_checkpoint(
    folder: str, kind: str, dealt: list[list[torch.Tensor]], first: int, last: int
) -> list[torch.Tensor]:
    """Trains on micro-batches first … last - 1 of a run with 2 a window, from and to torch.distributed.checkpoint."""
    model, given = wrapped(kind)
    optimizer = adamw(model)
    acc = bb.Accumulator(optimizer, every=2, model=model, **given)
    inside, mine = f"window of rank {dist.get_rank()}", dealt[dist.get_rank()]

    def state(name: str) -> dict[str, Any]:
        held, optimizers = states.get_state_dict(model, optimizer)
        return {"model": held, "optimizer": optimizers, name: b""}

    if first:
        # Where no window is open, what rank 0 saved is everybody's.
        name = inside if first % 2 else "window of rank 0"
        loaded = state(name)
        dcp.load(loaded, checkpoint_id=folder)
        states.set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        acc.load_state_dict(torch.load(io.BytesIO(loaded[name]), weights_only=True))
    for tokens in mine[first:last]:
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    torch.save(acc.state_dict(), file := io.BytesIO())
    dcp.save({**state(inside), inside: file.getvalue()}, checkpoint_id=folder)
    if last == len(mine):
        acc.flush()
    return parameters(model)


def error_everywhere(dealt: list[list[torch.Tensor]], kind: str) -> list[torch.Tensor]:
    """Every rank's second backward raises; the window is dropped, and the next ones are clean."""
    model, given = wrapped(kind)
    acc = bb.Accumulator(sgd(model), every=2, model=model, **given)

    def explode(_: torch.Tensor) -> None:
        raise OSError("inside autograd")

    for i, tokens in enumerate(dealt[dist.get_rank()]):
        scores = model(tokens[:, :-1].clamp(min=0))
        if i == 1:
            scores.register_hook(explode)
        loss = F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)
        try:
            acc.backward(loss, items=tokens_in(tokens))
        except OSError:
            assert acc.pending == 0
    return parameters(model)


def refused_shards(name: str) -> None:
    model = language_model(torch.bfloat16 if name == "narrow" else torch.float32)
    if name == "partly":
        fully_shard(model[1])
        fully_shard(model[4])
    else:
        fully_shard(model)
    scaler = torch.amp.GradScaler("cpu") if name == "scaler" else None
    sync = "never" if name == "sync" else "window"
    bb.Accumulator(sgd(model), every=1, model=model, scaler=scaler, sync=sync, noise=name == "noise")


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
