"""PyTorch: random models in random windows, with somebody else at work on their gradients at a random place.

Either the update is the one that plain PyTorch makes of the full batch, to 1e-12, or there is an exception, the
parameters and the optimizer are as they were before it, and the next window's update is the full batch's.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import bigbatch.torch as bb
from adversaries.torch_models import BY_MICRO_BATCH, F64, HOOKS, PARTS, D, Model, V
from conformance.torch_products import small_ones_too

MicroBatch = dict[str, Tensor]

# Gradients of rounding noise alone would make Adam's steps differ.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3, eps=1e-2),
}
ACTS = ["none", "none", "zero_grad", "zeros", "step", "backward", "clip", "write", "parameter", "accumulator", "split"]
SPARSE = {"sparse embedding"}


class Trained:
    """A model with its optimizer and schedule."""

    def __init__(self, model: Model, optimizer: str):
        self.model = model
        self.optimizer = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.numel()])
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.7)

    def state(self) -> list[Tensor]:
        slots = [t for slot in self.optimizer.state.values() for t in slot.values() if isinstance(t, Tensor)]
        rates = [torch.tensor(group["lr"], dtype=F64) for group in self.optimizer.param_groups]
        return [t.detach().to_dense().clone() for t in [*self.model.parameters(), *slots, *rates] if t.numel()]

    def follow(self, other: "Trained") -> None:
        """Goes on where the other one is."""
        with torch.no_grad():
            for own, p in zip(self.model.parameters(), other.model.parameters(), strict=True):
                own.copy_(p)
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        self.scheduler.load_state_dict(other.scheduler.state_dict())
        self.optimizer.zero_grad()


class Example(NamedTuple):
    """What was drawn."""

    windows: list[list[int]]  # of each window the rows of its micro-batches
    every: int
    split: bool
    fused: bool
    room: int
    clip_norm: float | None
    optimizer: str
    anomalies: bool
    act: str
    place: tuple[int, int]  # the window and the micro-batch before which somebody else acts
    number: int
    parts: list[str]
    hook: str

    @property
    def whole(self) -> bool:
        """Whether a row's gradient is the same in the full batch."""
        return not BY_MICRO_BATCH & set(self.parts) and self.hook != "late"

    def micro_batches(self, k: int) -> list[MicroBatch]:
        """The data of one window."""
        generator = torch.Generator().manual_seed(1000 * self.number + k)

        def drawn(n: int) -> MicroBatch:
            x, y = torch.randn(2, n, D, generator=generator, dtype=F64)
            ids = torch.randint(V, (n,), generator=generator)
            weight = torch.randint(1, 5, (n,), generator=generator).to(F64)
            # Now and then all rows go to one expert.
            route = torch.rand(n, generator=generator) < torch.rand((), generator=generator) * 2 - 0.5
            return {"x": x, "y": y, "ids": ids, "weight": weight, "route": route}

        return [drawn(n) for n in self.windows[k]]


def draw(data: st.DataObject) -> tuple[Example, Callable[[], Model]]:
    """One random example, and what makes its model anew."""
    integer, choice = st.integers, st.sampled_from
    parts = data.draw(st.lists(choice(sorted(PARTS)), min_size=1, max_size=3))
    ties = [data.draw(integer(0, i)) if data.draw(integer(0, 2)) == 0 else i for i in range(len(parts))]
    frozen = data.draw(st.lists(integer(0, len(parts) - 1), max_size=1)) if data.draw(integer(0, 4)) == 0 else []
    hook, factor = data.draw(choice(HOOKS)), data.draw(choice([1.0, 0.5]))
    number = data.draw(integer(0, 2**20))
    split = data.draw(st.booleans())
    every = data.draw(integer(1, 4))
    count = data.draw(integer(1, 3))
    rows = integer(1, 4)
    if split:
        size, windows = data.draw(rows), []
        for _ in range(count):
            last = data.draw(integer(1, size))
            windows.append([*[size] * (data.draw(integer(1, 4)) - 1), last])
    else:
        windows = [data.draw(st.lists(rows, min_size=every, max_size=every)) for _ in range(count - 1)]
        windows.append(data.draw(st.lists(rows, min_size=1, max_size=every)))
    window = data.draw(integer(0, count - 1))
    example = Example(
        windows, every, split,
        fused=data.draw(integer(0, 3)) > 0,
        room=data.draw(choice([2, 4, 8])),
        clip_norm=None if SPARSE & set(parts) else data.draw(choice([None, 0.1])),  # plain PyTorch cannot clip those
        optimizer=data.draw(choice(["sgd", "momentum"] if SPARSE & set(parts) else sorted(OPTIMIZERS))),
        anomalies=data.draw(integer(0, 19)) == 0,
        act=data.draw(choice(ACTS)),
        place=(window, data.draw(integer(0, len(windows[window]) - 1))),
        number=number, parts=parts, hook=hook,
    )  # fmt: skip
    return example, lambda: Model(parts, ties, hook, factor, frozen, number)


def act(example: Example, trained: Trained, m: MicroBatch) -> None:
    """What somebody else does."""
    model, optimizer = trained.model, trained.optimizer
    calls, seen = model.calls, model.seen
    try:
        _act(example, model, optimizer, m)
    finally:
        model.calls, model.seen = calls, seen


def _act(example: Example, model: Model, optimizer: torch.optim.Optimizer, m: MicroBatch) -> None:
    if example.act == "zero_grad":
        optimizer.zero_grad()
    elif example.act == "zeros":
        optimizer.zero_grad(set_to_none=False)
    elif example.act == "step":
        optimizer.step()
    elif example.act == "backward":
        model.loss(m).backward()
    elif example.act == "clip":
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    elif example.act == "write":
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)
    elif example.act == "parameter":
        with torch.no_grad():
            for i in sorted(model.used)[:1]:
                model.weights[i].mul_(1.5)
    elif example.act == "accumulator":
        bb.Accumulator(optimizer, every=2, fused=example.fused).backward(model.loss(m), items=1)
    elif example.act == "split":
        bb.backward(model.loss, m, micro_batch=1, fused=example.fused)


def plain(example: Example, trained: Trained, micro_batches: list[MicroBatch], before: Callable[[], None]) -> None:
    """The update as plain PyTorch makes it of the full batch, or of a sum that is written by hand."""
    model = trained.model
    model.begin()
    if example.whole:
        parts = [{name: torch.cat([m[name] for m in micro_batches]) for name in micro_batches[0]}]
    else:
        parts = micro_batches
    total = sum(m["weight"].sum() for m in micro_batches)
    before()
    for m in parts:
        (model.loss(m, example.anomalies) * (m["weight"].sum() / total)).backward()
    if example.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), example.clip_norm)
    trained.optimizer.step()
    trained.scheduler.step()
    trained.optimizer.zero_grad()


def by_the_split_api(
    example: Example, trained: Trained, micro_batches: list[MicroBatch], acts: dict[int, Callable[[], None]]
) -> None:
    """One window of the example through `bb.backward`."""
    calls = iter(range(len(micro_batches)))

    def loss_fn(m: MicroBatch) -> tuple[Tensor, Tensor]:
        acts.get(next(calls), _nothing)()
        return trained.model.loss(m, example.anomalies), m["weight"].sum()

    batch = {name: torch.cat([m[name] for m in micro_batches]) for name in micro_batches[0]}
    bb.backward(loss_fn, batch, micro_batch=len(micro_batches[0]["x"]), fused=example.fused)
    if example.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(trained.model.parameters(), example.clip_norm)
    trained.optimizer.step()
    trained.scheduler.step()
    trained.optimizer.zero_grad()


def by_the_stream_api(
    example: Example,
    trained: Trained,
    acc: bb.Accumulator,
    micro_batches: list[MicroBatch],
    acts: dict[int, Callable[[], None]],
) -> None:
    """One window of the example through an Accumulator."""
    for i, m in enumerate(micro_batches):
        acts.get(i, _nothing)()
        acc.backward(trained.model.loss(m, example.anomalies), items=m["weight"].sum().item())
    if acc.pending:
        acc.flush()


def _nothing() -> None:
    pass


def example(data: st.DataObject) -> None:
    """Draws one example and runs it.

    Raises:
        AssertionError: there was a third outcome.
    """
    drawn, made = draw(data)
    with small_ones_too(drawn.room), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, twin, counted = (Trained(made(), drawn.optimizer) for _ in range(3))
        losses = [t.model.loss(drawn.micro_batches(0)[0]) for t in (ours, twin)]
        if losses[1].requires_grad:
            losses[1].backward()
        if any(p.grad is not None for p in twin.model.parameters()):
            twin.optimizer.zero_grad()
            _run(drawn, ours, twin, counted)


def _run(drawn: Example, ours: Trained, twin: Trained, counted: Trained) -> None:
    acc = None
    if not drawn.split:
        acc = bb.Accumulator(
            ours.optimizer, every=drawn.every, clip_norm=drawn.clip_norm, scheduler=ours.scheduler, fused=drawn.fused
        )
    # All windows, and one more: what was refused in the last one is not to be found there.
    for number, k in enumerate([*range(len(drawn.windows)), 0]):
        micro_batches = drawn.micro_batches(k)
        place = drawn.place[1] if drawn.act != "none" and number == drawn.place[0] else None
        states = [ours.state()]

        def act_now(m: MicroBatch = micro_batches[0], states: list[Any] = states) -> None:
            act(drawn, ours, m)
            states.append(ours.state())

        acts = {} if place is None else {place: act_now}
        ours.model.begin()
        try:
            if acc is None:
                by_the_split_api(drawn, ours, micro_batches, acts)
            else:
                by_the_stream_api(drawn, ours, acc, micro_batches, acts)
        except Exception as error:
            counted.follow(ours)
            if acc is not None and (isinstance(error, NotImplementedError) or "Reentrant" in str(error)):
                acc.reset()  # what failed was the foreign call, which is not the window's business
            _check_refusal(drawn, ours, counted, micro_batches, states[-1], error, place)
            ours.optimizer.zero_grad()
        else:
            # Before a window anybody may do anything; a gradient that is left then is not the stream's.
            early = place == 0 and (drawn.split or drawn.act == "parameter")
            plain(
                drawn, twin, micro_batches, functools.partial(act, drawn, twin, micro_batches[0]) if early else _nothing
            )
            _check_update(drawn, ours, twin)
            if place is None and drawn.hook != "none":
                _check_hooks(drawn, ours, counted, micro_batches)
        twin.follow(ours)


def _check_refusal(
    drawn: Example,
    ours: Trained,
    plainly: Trained,
    micro_batches: list[MicroBatch],
    state: list[Tensor],
    error: Exception,
    place: int | None,
) -> None:
    """An exception has a reason, and moves nothing."""
    if "renormalized embedding" not in drawn.parts:  # whose forward moves its table
        for now, before in zip(ours.state(), state, strict=True):
            assert torch.equal(now, before), f"{drawn}: moved by a window that ended in {error!r}"
    if place is not None or "Reentrant" in str(error):
        return
    try:
        plain(drawn, plainly, micro_batches, _nothing)
    except Exception:
        return  # plain PyTorch cannot do it either
    raise AssertionError(f"{drawn}: refused for no reason") from error


def _check_update(drawn: Example, ours: Trained, twin: Trained) -> None:
    for now, right in zip(ours.state(), twin.state(), strict=True):
        error = (now - right).abs().max().item()
        assert error <= 1e-12 * max(1.0, right.abs().max().item()), f"{drawn}: off by {error:.1e}"


def _check_hooks(drawn: Example, ours: Trained, counted: Trained, micro_batches: list[MicroBatch]) -> None:
    """Hooks are called as often as in a loop that is written by hand, with the parameters as they are now."""
    model = counted.model
    counted.follow(ours)
    model.begin()
    for m in micro_batches:
        model.loss(m, drawn.anomalies).backward()
    counted.optimizer.zero_grad()
    assert ours.model.seen == model.seen, f"{drawn}: hooks were called {ours.model.seen} times, not {model.seen}"
    retained, right = ([t.grad is not None for t in m.retained] for m in (ours.model, model))
    assert retained == right, f"{drawn}: gradients that are retained: {retained}, not {right}"
