"""What the tests run in a rank that is not like the others, or fails where they do not."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import bigbatch.torch as bb
from bigbatch.engines.torch_fsdp import local
from ranks.in_rank import language_model, loss_of, parameters, sgd, texts, tokens_in, wrapped

Outcome = str | None


def odd() -> bool:
    """Whether this is the rank that is not like the others."""
    return dist.get_rank() == 1


class Warmup:
    """A callable without a name, whose repr has an address."""

    def __call__(self, index: int) -> int:
        return 2


def making(name: str) -> None:
    """Rank 1's Accumulator is made with something else."""
    model = DistributedDataParallel(language_model(torch.float32))
    rates: dict[str, Any] = {
        "lr": {"lr": 0.1 if odd() else 0.2}, "betas": {"betas": (0.9, 0.99 if odd() else 0.999)},
        "decay": {"weight_decay": 0.01 * odd()}, "amsgrad": {"amsgrad": odd()},
        "tensor lr": {"lr": torch.tensor(0.1 * (1 + odd()))},
    }  # fmt: skip
    kinds = {"class": torch.optim.Adam if odd() else torch.optim.AdamW}
    held = list(model.parameters())
    if name == "order" and odd():
        held[3], held[4] = held[4], held[3]  # of one shape
    if name == "groups":
        held = [{"params": held[:3]}, {"params": held[3:]}] if odd() else [{"params": held[:4]}, {"params": held[4:]}]
    if name == "value" and odd():
        with torch.no_grad():
            held[1][2, 3] += 1e-6
    if name == "half":
        del held
        model = DistributedDataParallel(language_model(torch.bfloat16))
        held = list(model.parameters())
        if odd():
            held[5].data[0] *= 1.01
    optimizer = kinds.get(name, torch.optim.AdamW)(held, **rates.get(name, {}))
    schedulers = torch.optim.lr_scheduler
    options: dict[str, Any] = {
        "scheduler": {"scheduler": schedulers.StepLR(optimizer, 3) if odd() and name == "scheduler" else None},
        "gamma": {"scheduler": schedulers.StepLR(optimizer, 3, gamma=0.5 if odd() else 0.9)} if name == "gamma" else {},
        "scaler": {"scaler": torch.amp.GradScaler("cpu") if odd() else None},
        "scale": {"scaler": torch.amp.GradScaler("cpu", init_scale=2.0 if odd() else 4.0)},
        "fused": {"fused": odd()}, "partial": {"partial": "carry" if odd() else "drop"},
        "nonfinite": {"nonfinite": "raise" if odd() else "skip"}, "noise": {"noise": odd()},
        "same callable": {"every": Warmup()},
    }  # fmt: skip
    bb.Accumulator(optimizer, **{"every": 4, "model": model, **options.get(name, {})})


def later(dealt: list[list[torch.Tensor]], name: str) -> tuple[list[str], bool, list[torch.Tensor]]:
    """After the first of four windows rank 1 becomes another; before the third it is as the others again.

    What was said, whether the parameters stayed as they were then, and the parameters at the end.
    """
    kind = "fsdp window" if name == "every, sharded" else "ddp"
    model, given = wrapped(kind)
    optimizer = sgd(model)
    plans = {"odd": False}
    every: Any = (lambda index: 1 if plans["odd"] and odd() else 2) if name.startswith("every") else 2
    acc = bb.Accumulator(optimizer, every=every, model=model, **given)
    said, still = [], True

    def change(back: bool) -> None:
        plans["odd"] = not back
        if name == "lr" and odd():
            optimizer.param_groups[0]["lr"] = 0.1 if back else 0.05
        if name == "requires_grad" and odd():
            next(model.parameters()).requires_grad_(back)
        if name == "index" and odd():
            acc._gradients._index = 1 if back else 7

    for i, tokens in enumerate(dealt[dist.get_rank()]):
        if i in (2, 4):
            change(back=i == 4)
        before = [p.clone() for p in parameters(model)]
        try:
            acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
            still = all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
            if name.startswith("every"):
                change(back=True)
    return said, still, parameters(model)


def caught(function: Callable[[], Any]) -> Outcome:
    """What was said, or None."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def wrong_argument(name: str, kind: str, everywhere: bool) -> tuple[Outcome, list[torch.Tensor]]:
    """Rank 1, or every rank, passes something wrong and catches the error; then a window is as ever."""
    model, given = wrapped(kind)
    optimizer, bad, mine = sgd(model), odd() or everywhere, texts(2, seed=dist.get_rank())

    def making(**options: Any) -> Callable[[], Any]:
        return lambda: bb.Accumulator(optimizer, **{"every": 2, "model": model, **given, **(options if bad else {})})

    def split(**options: Any) -> Callable[[], Any]:
        def loss_fn(t: torch.Tensor) -> Any:
            loss, found = loss_of(model, t), options if bad else {}
            if "raising" in found:
                raise OSError("a broken record")
            return found.get("loss", loss), found.get("items", tokens_in(t))

        passed = {"batch": torch.cat(mine), "micro_batch": 2, "model": model, **given}
        if bad:
            passed |= {key: value for key, value in options.items() if key in ("batch", "micro_batch", "dtype")}
        return lambda: bb.backward(loss_fn, passed.pop("batch"), **passed)

    calls: dict[str, Callable[[], Any]] = {
        "every=0": making(every=0), "every='2'": making(every="2"), "clip_norm": making(clip_norm=-1.0),
        "nonfinite": making(nonfinite="no"), "optimizer": making(optimizer=None), "scheduler": making(scheduler=3),
        "model": making(model=language_model()), "not a model": making(model=3), "noise": making(noise="x"),
        "micro_batch=0": split(micro_batch=0), "micro_batch='a'": split(micro_batch="a"), "batch": split(batch=[3]),
        "lengths": split(batch=[mine[0][:1], mine[0][:0]]),
        "raising": split(raising=True), "loss": split(loss=3.0), "items": split(items=-1),
    }  # fmt: skip
    calls["optimizer"] = lambda: bb.Accumulator(3 if bad else optimizer, every=2, model=model, **given)  # pyright: ignore
    said = caught(calls[name])
    assert all(p.grad is None for p in model.parameters()) or said is None
    acc = bb.Accumulator(optimizer, every=2, model=model, **given)
    for tokens in mine:
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return said, parameters(model)


def wrong_micro_batch(
    dealt: list[list[torch.Tensor]], name: str, place: int, kind: str, everywhere: bool
) -> tuple[list[str], list[torch.Tensor], int]:
    """Rank 1, or all, call `backward` wrongly for one micro-batch of a window of three, and go on with a new window."""
    model, given = wrapped(kind)
    every = bb.items(10_000) if name == "items, counted" else 3
    acc = bb.Accumulator(sgd(model), every=every, model=model, **given)
    said, pending = [], 0
    for i, tokens in enumerate(dealt[dist.get_rank()]):
        loss, items = loss_of(model, tokens), tokens_in(tokens)
        if i == place and (odd() or everywhere):
            pending = acc.pending
            loss = loss * torch.ones(2) if name == "loss" else loss
            items = items if name == "loss" else -1
        try:
            acc.backward(loss, items=items)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
            if i != place or not everywhere:
                assert acc.pending == 0 or kind != "ddp"
            else:
                assert acc.pending == pending or kind != "ddp"
            if kind == "ddp" and not everywhere:
                break
    if kind == "ddp" and not everywhere:
        for tokens in dealt[dist.get_rank()][-3:]:
            acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return said, parameters(model), acc.index


def apart(first: str, second: str) -> tuple[Outcome, list[torch.Tensor]]:
    """The ranks make different calls; then they make a window together."""
    model = DistributedDataParallel(language_model())
    acc, mine = bb.Accumulator(sgd(model), every=2, model=model), texts(2, seed=dist.get_rank())
    state = acc.state_dict()

    def window() -> None:
        for tokens in mine:
            acc.backward(loss_of(model, tokens), items=tokens_in(tokens))

    calls: dict[str, Callable[[], Any]] = {
        "Accumulator.backward": window,
        "Accumulator.flush": acc.flush,
        "Accumulator(...)": lambda: bb.Accumulator(sgd(model), every=2, model=model),
        "Accumulator.load_state_dict": lambda: acc.load_state_dict(state),
        "bigbatch.torch.backward": lambda: bb.backward(
            lambda t: (loss_of(model, t), tokens_in(t)), torch.cat(mine), micro_batch=2, model=model
        ),
    }
    said = caught(calls[second if odd() else first])
    assert acc.pending == 0
    window()
    return said, parameters(model)


def broken_loader(kind: str) -> tuple[Outcome, list[torch.Tensor]]:
    """Rank 1's loader raises inside `join`."""
    model, given = wrapped(kind)
    acc, mine = bb.Accumulator(sgd(model), every=2, model=model, **given), texts(2, seed=dist.get_rank())

    def loader() -> Any:
        if odd():
            raise OSError("a broken record")
        yield from mine

    said = caught(lambda: list(acc.join(loader())))
    for tokens in mine:
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return said, parameters(model)


def refused_on_one(name: str) -> None:
    """Each must be refused on one rank as on several."""
    shards = name.startswith("shards")
    model: nn.Module = language_model(torch.bfloat16 if name == "shards, bfloat16" else torch.float32)
    if name == "fsdp1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    elif shards:
        fully_shard(model)
    else:
        model = DistributedDataParallel(model, static_graph=name == "static_graph")
    if name == "shards, divided":
        model.set_gradient_divide_factor(4.0)
    options: dict[str, Any] = {
        "until_noise": {"every": bb.until_noise(at_most=4)},
        "shards, until_noise": {"every": bb.until_noise(at_most=4)},
        "shards, noise": {"noise": True}, "shards, scaler": {"scaler": torch.amp.GradScaler("cpu")},
        "sync": {"sync": "micro_batch"}, "sync, its default": {"sync": "window"}, "shards, sync": {"sync": "now"},
        "sync without a model": {"sync": "window", "model": None},
    }  # fmt: skip
    tokens = texts(1, seed=1)[0]
    loss_of(model, tokens)
    try:
        if name == "shards, auto":
            bb.backward(lambda t: loss_of(model, t), tokens, micro_batch="auto", model=model)
        elif name == "split, sync":
            bb.backward(lambda t: loss_of(model, t), tokens, micro_batch=1, model=model, sync="window")
        else:
            bb.Accumulator(sgd(model), **{"every": 2, "model": model, **options.get(name, {})})
    finally:
        assert not any(isinstance(local(p), FakeTensor) for p in model.parameters())
        loss_of(model, tokens)


def bad_state(place: int, how: str, kind: str) -> tuple[Outcome, list[torch.Tensor]]:
    """Rank 1's state is bad, and loaded inside a window; that goes on as if nothing had been."""
    model, given = wrapped(kind)
    acc, mine = bb.Accumulator(sgd(model), every=3, model=model, **given), texts(3, seed=dist.get_rank())
    saved: Any = None
    for i, tokens in enumerate(mine):
        if i == place:
            saved = [acc.state_dict()]
            states = [None] * dist.get_world_size()
            dist.all_gather_object(states, saved[0])
            if how == "of rank 0":
                saved = [states[0]]
            if odd():
                saved = {"keys": [{}], "index": [{**saved[0], "index": 5}], "of rank 0": saved,
                         "shapes": [{**saved[0], "shapes": [(1,)]}], "not a state": [3]}[how]  # fmt: skip
            said = caught(lambda state=saved[0]: acc.load_state_dict(state))
            assert acc.pending == place
        acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return said, parameters(model)


def acts_on_one(dealt: list[list[torch.Tensor]], act: str, place: int) -> tuple[Outcome, bool, list[torch.Tensor]]:
    """Somebody does something to the open window on rank 1 only. Then a window is as ever."""
    model = DistributedDataParallel(language_model())
    optimizer = sgd(model)
    acc, mine = bb.Accumulator(optimizer, every=3, model=model), dealt[dist.get_rank()]
    probe = texts(1, seed=99)[0]

    def write() -> None:
        next(p.grad for p in model.parameters() if p.grad is not None).mul_(2)

    acts: dict[str, Callable[[], Any]] = {
        "zero_grad": optimizer.zero_grad,
        "set_to_none=False": lambda: optimizer.zero_grad(set_to_none=False),
        "step": optimizer.step,
        "backward": lambda: loss_of(model.module, probe).backward(),
        "backward()": lambda: loss_of(model, probe).backward(),
        "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
        "in-place write": write,
        "second window": lambda: bb.Accumulator(optimizer, every=2).backward(loss_of(model, probe), items=3),
    }
    before = parameters(model)
    before = [p.clone() for p in before]

    def window() -> None:
        for i, tokens in enumerate(mine[:3]):
            if i == place and odd():
                acts[act]()
            acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
        if place == 3 and odd():
            acts[act]()
        acc.flush()

    if place == 3:  # just before the flush, in a window that is not full
        mine = [*mine[1:3], *mine[3:]]
        acc.every = 4

        def window() -> None:
            for tokens in mine[:2]:
                acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
            if odd():
                acts[act]()
            acc.flush()

    said = caught(window)
    still = all(torch.equal(a, b) for a, b in zip(before, parameters(model), strict=True))
    acc.every = 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tokens in mine[-3:]:
            acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return said, still, parameters(model)


def foreign_backward(dealt: list[list[torch.Tensor]], kind: str, place: int) -> tuple[Outcome, list[torch.Tensor]]:
    """A backward of somebody else inside a window of shards, on all ranks as it has to be; then a window is as ever."""
    model, given = wrapped(kind)
    acc, mine = bb.Accumulator(sgd(model), every=3, model=model, **given), dealt[dist.get_rank()]

    def window() -> None:
        for i, tokens in enumerate(mine[:3]):
            if i == place:
                loss_of(model, mine[0]).backward()
            acc.backward(loss_of(model, tokens), items=tokens_in(tokens))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = caught(window)
        acc.reset()
        for tokens in mine[3:]:
            acc.backward(loss_of(model, tokens), items=tokens_in(tokens))
    return said, parameters(model)


def step_failed(dealt: list[list[torch.Tensor]]) -> list[Outcome]:
    """Rank 1's optimizer raises in its step, so that the ranks' parameters differ from then on."""
    model = DistributedDataParallel(language_model())
    optimizer = sgd(model)
    acc, said, fails = bb.Accumulator(optimizer, every=2, model=model), [], odd()

    def fail(*_: Any) -> None:
        nonlocal fails
        if fails:
            fails = False
            raise OSError("no memory for its state")

    optimizer.register_step_pre_hook(fail)
    for tokens in dealt[dist.get_rank()]:
        said.append(caught(lambda tokens=tokens: acc.backward(loss_of(model, tokens), items=tokens_in(tokens))))
    return said
