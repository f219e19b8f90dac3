"""What the tests run in a rank while somebody else sets the flags that decide when a model reduces by itself."""

import copy
import gc
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bigbatch.torch as bb
from ranks import in_rank
from ranks.in_rank import loss_of, parameters, sgd, tokens_in, wrapped


def set_flag(model: Any, reduces: bool) -> None:
    """As Lightning and Accelerate set it."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = model.require_forward_param_sync = reduces
    else:
        model.set_requires_gradient_sync(reduces)
        model.set_is_last_backward(reduces)


@contextmanager
def no_sync(model: Any) -> Any:
    """Accelerate's, for either model."""
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        if not isinstance(model, DistributedDataParallel):
            model.set_requires_gradient_sync(False)
        yield
        if not isinstance(model, DistributedDataParallel):
            model.set_requires_gradient_sync(True)


class Flipping:
    """Calls what changes a flag before and after the making, each forward, and each backward of ours."""

    def __init__(self, model: Any, how: str):
        self.model, self.how, self.stack, self.calls = model, how, ExitStack(), 0

    def __call__(self, place: str) -> None:
        self.calls += 1
        if self.how == "on everywhere":
            set_flag(self.model, True)
        if self.how == "at random":
            draw = torch.Generator().manual_seed(self.calls * 7 + dist.get_rank())  # each rank at other places
            set_flag(self.model, bool(torch.randint(2, (), generator=draw)))
        if self.how == f"entered before {place}":
            self.stack.enter_context(no_sync(self.model))
        if self.how == f"left after {place}" and self.calls == 1:
            self.stack.enter_context(no_sync(self.model))
        elif self.how == f"left after {place}":
            self.stack.close()


def stream(dealt: list[list[torch.Tensor]], kind: str, how: str) -> list[torch.Tensor]:
    """Three windows of two micro-batches and a flush, while flags change."""
    model, given = wrapped(kind)
    flip = Flipping(model, how)
    flip("making")
    acc = bb.Accumulator(sgd(model), every=2, model=model, **given)
    flip("making")
    for tokens in dealt[dist.get_rank()]:
        flip("forward")
        loss = loss_of(model, tokens)
        flip("backward")
        acc.backward(loss, items=tokens_in(tokens))
        flip("backward")
    flip("flush")
    acc.flush()
    flip.stack.close()
    return parameters(model)


def split(dealt: list[list[torch.Tensor]], kind: str, how: str) -> list[torch.Tensor]:
    """One update, while flags change around the call and inside loss_fn."""
    model, given = wrapped(kind)
    step, flip = sgd(model), Flipping(model, how)

    def loss_fn(t: torch.Tensor) -> tuple[torch.Tensor, int]:
        flip("forward")
        loss = loss_of(model, t)
        flip("backward")
        return loss, tokens_in(t)

    flip("making")
    bb.backward(loss_fn, torch.cat(dealt[dist.get_rank()]), micro_batch=2, model=model, **given)
    flip("flush")
    step.step()
    flip.stack.close()
    return parameters(model)


def forward_before(dealt: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The first loss is of a forward that the model was going to reduce after."""
    model = DistributedDataParallel(in_rank.language_model())
    mine = dealt[dist.get_rank()]
    loss = loss_of(model, mine[0])
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    acc.backward(loss, items=tokens_in(mine[0]))
    acc.backward(loss_of(model, mine[1]), items=tokens_in(mine[1]))
    return parameters(model)


def split_inside(dealt: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """A call of the split API between two windows of an Accumulator, and a frozen copy of the model in its forward."""
    model = DistributedDataParallel(in_rank.language_model())
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    for i, tokens in enumerate(dealt[dist.get_rank()]):
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
        if i % 2:
            bb.backward(lambda t: (loss_of(model, t), tokens_in(t)), tokens, micro_batch=1, model=model)
            model.zero_grad()
    return parameters(model)


def afterwards(dealt: list[list[torch.Tensor]], end: str) -> tuple[bool, list[torch.Tensor]]:
    """Whether the model reduces by itself again once its Accumulator, or a call of the split API, has gone."""
    model = DistributedDataParallel(in_rank.language_model())
    tokens = dealt[dist.get_rank()][0]
    with model.no_sync():
        if end == "split":
            bb.backward(lambda t: loss_of(model, t), tokens, micro_batch=1, model=model)
            inside = model.require_backward_grad_sync
        else:
            acc = bb.Accumulator(sgd(model), every=2, model=model)
            acc.backward(loss_of(model, tokens), items=1)
            inside = model.require_backward_grad_sync
            acc.reset()
            if end == "accumulator":
                del acc
                gc.collect()
    if end == "accumulator, later":
        acc.backward(loss_of(model, tokens), items=1)
        acc.reset()
        del acc
        gc.collect()
    model.zero_grad()
    loss_of(model, tokens).backward()
    return inside, [p.grad.clone() for p in model.parameters()]


def compiled(dealt: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """torch.compile around the wrapper, and flags that are set in between."""
    torch._dynamo.config.optimize_ddp = False
    model = DistributedDataParallel(in_rank.language_model())
    fast: Any = torch.compile(model, backend="eager")
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    for tokens in dealt[dist.get_rank()]:
        set_flag(model, True)
        acc.backward(loss_of(fast, tokens), items=tokens_in(tokens))
    acc.flush()
    return parameters(model)


def private_names() -> None:
    """Those of DistributedDataParallel that bigbatch uses are there and mean what they did."""
    model = DistributedDataParallel(nn.Linear(2, 1))
    assert model._join_config.enable is False
    rank = dist.get_rank()
    loss = model(torch.full((1, 2), float(rank))).sum()  # this forward is one that the model reduces after
    model.reducer._reset_state()
    loss.backward()
    assert model.module.weight.grad.tolist() == [[rank, rank]]
    model.zero_grad()
    model(torch.full((1, 2), float(rank))).sum().backward()
    assert model.module.weight.grad.tolist() == [[0.5, 0.5]]


def inside_join() -> None:
    model = DistributedDataParallel(in_rank.language_model())
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    with model.join():
        acc.backward(loss_of(model, in_rank.texts(1, seed=0)[0]), items=1)


def copied(dealt: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """A copy of the model, as an average of weights has it, does not disturb the window."""
    model = DistributedDataParallel(in_rank.language_model())
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    average = copy.deepcopy(model.module)
    for tokens in dealt[dist.get_rank()]:
        loss_of(average, tokens)
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return parameters(model)


def averages(counts: list[int]) -> list[torch.Tensor]:
    """BatchNorm's averages, which the model would share in every forward, on ranks with unequally many of them."""
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    for _ in range(counts[dist.get_rank()]):
        set_flag(model, True)
        acc.backward(model(torch.randn(4, 3)).square().mean(), items=4)
    acc.flush()
    return [b.clone() for b in model.module.buffers()]


def wrapper_options(dealt: list[list[torch.Tensor]], name: str) -> list[torch.Tensor]:
    """Options of DistributedDataParallel's that change how it reduces by itself, which it does not here."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = in_rank.language_model(), nn.Linear(2, 2, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # A parameter that only one rank's loss reaches, and there with a gradient of zero.
            return self.net(x) + (0 * self.unused.weight.sum() if dist.get_rank() == 1 else 0)

    inner = in_rank.language_model() if name == "delayed" else Partly()
    options: dict[str, Any] = {} if name in ("hook", "ignored", "delayed") else {name: True}
    if name == "ignored":
        inner._ddp_params_and_buffers_to_ignore = ["net.1.bias"]
    if name == "delayed":
        options["delay_all_reduce_named_params"] = [("1.bias", inner[1].bias)]
        options["param_to_hook_all_reduce"] = inner[4].bias
    model = DistributedDataParallel(inner, **options)
    if name == "hook":
        model.register_comm_hook(None, _never)
    acc = bb.Accumulator(sgd(model), every=2, model=model)
    for tokens in dealt[dist.get_rank()]:
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return parameters(model)[:7]


def _never(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    raise AssertionError("the model reduced by itself")
