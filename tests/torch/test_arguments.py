"""What is passed to the APIs: several optimizers, wrappers, closures, items on a device, text, outputs, mistakes."""

import copy
import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb

SIZES = (5, 1, 4, 2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def data(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(12, width, generator=generator, dtype=torch.float64) for width in (4, 1))


def loss_of(model, x, y):
    return F.mse_loss(model(x), y)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def agree(model, twin, tolerance=1e-12):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def feed(acc, model, xy):
    updates = [
        acc.backward(loss_of(model, x, y), items=len(x)) for x, y in zip(*(t.split(SIZES) for t in xy), strict=True)
    ]
    return updates[-1]


# Several optimizers, and wrappers of one.


def two(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = getattr(torch.optim, "Muon", torch.optim.RMSprop)  # from PyTorch 2.9 on
    optimizers = [muon(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=0.1)]
    return optimizers, [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in optimizers]


def test_two_optimizers_make_one_update():
    """Clipped together, stepped once each, and saved inside a window."""
    model, twin, xy = network(), network(), data()
    (ours, schedulers), (theirs, others) = two(model), two(twin)
    acc = bb.Accumulator(ours, every=4, clip_norm=0.1, scheduler=schedulers)
    assert f"{type(ours[0]).__name__}+AdamW" in repr(acc)
    for k in range(3):
        x, y = (t.split(SIZES) for t in xy)
        for part in zip(x[:2], y[:2], strict=True):
            acc.backward(loss_of(model, *part), items=len(part[0]))
        state = copy.deepcopy(acc.state_dict())
        acc.load_state_dict(state)
        for part in zip(x[2:], y[2:], strict=True):
            update = acc.backward(loss_of(model, *part), items=len(part[0]))
        assert update.index == k
        loss_of(twin, *xy).backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        assert update.grad_norm == pytest.approx(norm.item(), rel=1e-12)
        for o in (*theirs, *others):
            o.step()
        twin.zero_grad()
        agree(model, twin, 1e-9)  # Muon's iteration amplifies rounding
    for o in ours:
        acc.backward(loss_of(model, *xy), items=12)
        with pytest.raises(RuntimeError, match=r"step\(\) was called inside an open window"):
            o.step()
        assert acc.pending == 0


def test_two_optimizers_with_a_scaler():
    model, twin = network().float(), network().float()
    (ours, _), (theirs, _) = two(model), two(twin)
    xy = tuple(t.float() for t in data())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    acc = bb.Accumulator(ours, every=4, scaler=scaler)
    start = weights(model)
    bad = xy[0].clone()
    bad[3] = math.inf
    assert "not finite" in feed(acc, model, (bad, xy[1])).skipped
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert feed(acc, model, xy).skipped is None
    loss_of(twin, *xy).backward()
    for o in theirs:
        o.step()
    agree(model, twin, 1e-4)


@pytest.mark.parametrize("several", [[], "twice", "shared"])
def test_optimizers_that_cannot_make_one_update(several):
    model = network()
    one = sgd(model)
    given = {"twice": [one, one], "shared": [one, torch.optim.AdamW(model[2].parameters())]}.get(str(several), several)
    with pytest.raises(ValueError, match="Optimizers of one update share no parameter"):
        bb.Accumulator(given, every=4)


def test_a_list_with_something_else():
    model = network()
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        bb.Accumulator([sgd(model), model], every=4)
    with pytest.raises(ValueError, match=r"bb\.backward inside the closure"):
        bb.Accumulator([torch.optim.LBFGS(model.parameters())], every=4)


def test_a_closure_works_with_the_split_call():
    """As the refusal of LBFGS says."""
    model, twin, xy = network(), network(), data()
    for m, step in ((model, lambda m: bb.backward(lambda b: loss_of(m, *b), xy, micro_batch=5)), (twin, None)):
        optimizer = torch.optim.LBFGS(m.parameters(), lr=0.5, max_iter=5, line_search_fn="strong_wolfe")

        def closure(m=m, step=step, optimizer=optimizer):
            optimizer.zero_grad()
            if step is not None:
                return step(m)
            loss = loss_of(m, *xy)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    agree(model, twin, 1e-8)


def test_what_accelerate_prepares_is_refused():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = network(), None
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    prepared, prepared_scheduler = accelerator.prepare(optimizer, scheduler)
    with pytest.raises(ValueError, match=r"AcceleratedOptimizer wraps an optimizer.*optimizer\.optimizer"):
        bb.Accumulator(prepared, every=4)
    with pytest.raises(ValueError, match=r"Pass what it wraps: scheduler\.scheduler"):
        bb.Accumulator(optimizer, every=4, scheduler=prepared_scheduler)
    acc = bb.Accumulator(prepared.optimizer, every=4, scheduler=prepared_scheduler.scheduler)
    acc.backward(loss_of(model, *data()), items=12)
    with pytest.raises(RuntimeError, match="open window"):
        prepared.step()
    assert acc.pending == 0


class ByEpoch:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, epoch, metric=None): ...


class NativeScaler:
    """As timm has it."""

    def __call__(self, loss, optimizer): ...

    def state_dict(self): ...


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"scheduler": ByEpoch},
            ValueError,
            r"scheduler\.step must need no argument.*Received: ByEpoch\.step\(epoch\)",
        ),
        ({"scheduler": lambda o: [ByEpoch(o)]}, ValueError, r"scheduler\.step must need no argument"),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.StepLR(sgd(network()), 1)},
            ValueError,
            "scheduler must be of the optimizer that is given. Received: StepLR of another SGD",
        ),
        (
            {"scaler": lambda o: NativeScaler()},
            TypeError,
            "scaler must be a torch.amp.GradScaler.*unscale_.*NativeScaler",
        ),
        ({"scaler": lambda o: True}, TypeError, "scaler must be a torch.amp.GradScaler"),
        (
            {"scaler": lambda o: torch.amp.GradScaler("cpu"), "nonfinite": "apply"},
            ValueError,
            'nonfinite="apply" has no effect with a scaler',
        ),
        (
            {"dtype": "float32"},
            TypeError,
            r"dtype must be a floating torch.dtype or None. Received: dtype='float32' \(str\)",
        ),
        ({"dtype": torch.int32}, ValueError, "dtype must be a floating torch.dtype or None"),
        ({"dtype": torch.complex64}, ValueError, "dtype must be a floating torch.dtype or None"),
        ({"fused": "no"}, TypeError, "fused must be True or False. Received: fused='no'"),
        ({"fused": None}, TypeError, "fused must be True or False"),
        ({"sync": "micro_batch"}, ValueError, "sync says when a fully_shard model adds up"),
        ({"every": bb.until_noise(at_most=4), "noise": "x"}, ValueError, "noise must be True, False or an integer"),
        (
            {"every": bb.until_noise(at_most=4), "noise": 5},
            ValueError,
            "noise has no effect with every=until_noise.*Received: noise=5",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes_are_refused_when_made(options, kind, message):
    model = network()
    optimizer = sgd(model)
    options = {name: value(optimizer) if callable(value) and name in ("scheduler", "scaler") else value
               for name, value in options.items()}  # fmt: skip
    with pytest.raises(kind, match=message):
        bb.Accumulator(optimizer, **{"every": 4, **options})
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_disabled_scaler_may_apply_what_is_not_finite():
    model = network()
    acc = bb.Accumulator(sgd(model), every=1, scaler=torch.amp.GradScaler("cpu", enabled=False), nonfinite="apply")
    assert acc.backward(loss_of(model, *data()) * math.nan, items=1).skipped is None
    assert all(p.isnan().any() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"micro_batch": "Auto"},
            TypeError,
            r"micro_batch must be an integer or \"auto\". Received: micro_batch='Auto'",
        ),
        ({"dtype": "float32"}, TypeError, "dtype must be a floating torch.dtype or None"),
        ({"fused": 1}, TypeError, "fused must be True or False"),
        ({"sync": "window"}, ValueError, "sync says when a fully_shard model adds up"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_mistakes_of_a_split_call(options, kind, message):
    model = network()
    with pytest.raises(kind, match=message):
        bb.backward(lambda b: loss_of(model, *b), data(), **{"micro_batch": 5, **options})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("api", ["backward", "plan", "auto", "audit"])
@pytest.mark.parametrize(
    ("result", "kind", "message"),
    [
        (lambda m, b: m(b[0])[:, 0], ValueError, "The loss must be a scalar of a floating type"),
        (lambda m, b: (m(b[0]).mean(), 1, 2), TypeError, "loss_fn must return the mean loss or .* a tuple of 3"),
        (lambda m, b: 1.0, ValueError, "The loss must be a scalar of a floating type"),
        (lambda m, b: b[0].mean(), ValueError, "The loss needs no gradient"),
        (lambda m, b: (m(b[0]).mean(), -1), ValueError, "items must be positive"),
        (lambda m, b: SimpleNamespace(loss=None), ValueError, "The loss must be a scalar of a floating type"),
    ],
    ids=["vector", "triple", "number", "detached", "items", "output without a loss"],
)
def test_what_a_loss_fn_may_not_return(api, result, kind, message):
    model, xy = network(), data()
    calls = {
        "backward": lambda: bb.backward(lambda b: result(model, b), xy, micro_batch=5),
        "auto": lambda: bb.backward(lambda b: result(model, b), xy, micro_batch="auto"),
        "plan": lambda: bb.plan(lambda b: result(model, b), xy),
        "audit": lambda: bb.audit(lambda b: result(model, b), model, xy, micro_batch=5),
    }
    with pytest.raises(kind, match=message):
        calls[api]()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dtype": "float32"}, TypeError, "dtype must be a floating torch.dtype"),
        ({"time": "yes"}, TypeError, "time must be True or False"),
    ],
)
def test_mistakes_of_a_plan(options, kind, message):
    model = network()
    with pytest.raises(kind, match=message):
        bb.plan(lambda b: loss_of(model, *b), data(), **options)


# Items on the device, and losses that are not finite.

BAD_ITEMS = [-4, -1e-3, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("nonfinite", ["skip", "apply", "raise"])
@pytest.mark.parametrize("bad", BAD_ITEMS)
@pytest.mark.parametrize("place", [0, 2, 3])
def test_items_in_a_tensor_that_are_no_count_skip_the_window(bad, place, nonfinite):
    model, twin, xy = network(), network(), data()
    acc = bb.Accumulator(sgd(model), every=4, nonfinite=nonfinite)

    def window(model, acc, bad):
        for k, (x, y) in enumerate(zip(*(t.split(SIZES) for t in xy), strict=True)):
            update = acc.backward(loss_of(model, x, y), items=torch.tensor(bad if k == place else len(x)))
        return update

    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="items are negative, NaN or infinite"):
            window(model, acc, bad)
    else:
        assert "items are negative, NaN or infinite" in window(model, acc, bad).skipped
    assert acc.index == acc.pending == 0
    agree(model, twin)
    window(model, acc, SIZES[place])
    loss_of(twin, *xy).backward()
    sgd(twin).step()
    agree(model, twin)


@pytest.mark.parametrize("bad", BAD_ITEMS)
@pytest.mark.parametrize("place", [0, 2])
def test_the_same_in_a_split_call(bad, place):
    model, (x, y), calls = network(), data(), []
    held = torch.ones_like(model[0].weight)
    model[0].weight.grad = held

    def loss_fn(m):
        calls.append(0)
        return loss_of(model, *m), torch.tensor(bad if len(calls) == place + 1 else len(m[0]))

    with pytest.raises(ValueError, match=r"A micro-batch's items are negative, NaN or infinite\. Received: items="):
        bb.backward(loss_fn, (x, y), micro_batch=5)
    assert model[0].weight.grad is held
    assert torch.equal(held, torch.ones_like(held))
    assert model[2].weight.grad is None


def test_a_batch_without_items():
    model = network()
    with pytest.raises(ValueError, match=r"The batch holds no items. Received: items=0\.0 over 3 micro-batches"):
        bb.backward(lambda m: (loss_of(model, *m), torch.tensor(0)), data(), micro_batch=5)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_infinite_loss_is_refused_as_one_that_is_no_number(value):
    model, (x, y), held = network(), data(), torch.ones(5, 4, dtype=torch.float64)
    model[0].weight.grad = held
    y[7] = value
    with pytest.raises(ValueError, match=r"The loss is (not a number|infinite). Received: loss="):
        bb.backward(lambda m: (model(m[0]) + m[1]).mean(), (x, y), micro_batch=5)
    assert model[0].weight.grad is held
    assert model[2].weight.grad is None


# Text in a batch, and outputs that hold a loss.


class Example(NamedTuple):
    x: torch.Tensor
    captions: tuple


@pytest.mark.parametrize("make", [
    lambda x, text: {"x": x, "captions": text},
    lambda x, text: (x, text),
    lambda x, text: [x, tuple(text)],
    lambda x, text: Example(x, tuple(text)),
    lambda x, text: {"inner": {"captions": [t.encode() for t in text]}, "x": x},
], ids=["dict", "tuple", "tuples", "named tuple", "bytes"])  # fmt: skip
def test_lists_of_text_are_cut_like_tensors(make):
    model, (x, _) = network(), data()
    text = [f"example {i}" for i in range(12)]
    seen = []

    def parts_of(m):
        if isinstance(m, dict):
            return m["x"], m.get("captions") or m["inner"]["captions"]
        return m[0], m[1]

    def loss_fn(m):
        part, captions = parts_of(m)
        assert len(part) == len(captions)
        seen.extend(captions)
        return model(part).square().mean()

    bb.backward(loss_fn, make(x, text), micro_batch=5)
    assert [t.decode() if isinstance(t, bytes) else t for t in seen] == text
    assert bb.audit(loss_fn, model, make(x, text), micro_batch=5).exact
    assert bb.plan(loss_fn, make(x, text)).micro_batch == 12


def test_text_of_another_length_and_missing_captions():
    model, (x, _) = network(), data()
    with pytest.raises(ValueError, match=r"same length. Received: batch\[0\] of length 12, batch\[1\] of length 3"):
        bb.backward(lambda m: model(m[0]).mean(), (x, ["a", "b", "c"]), micro_batch=5)
    seen = []
    captions = [None, "a", None, "b"] * 3
    bb.backward(lambda m: (seen.extend(m[1]), model(m[0]).mean())[1], (x, captions), micro_batch=5)
    assert seen == captions
    with pytest.raises(TypeError, match=r"Received: batch\['n'\]=3 \(int\)"):
        bb.backward(lambda m: model(m["x"]).mean(), {"x": x, "n": 3}, micro_batch=5)


class ModelOutput(OrderedDict):
    """As Transformers has it: a mapping whose entries are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Output(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


@pytest.mark.parametrize("kind", [ModelOutput, SimpleNamespace, Output], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("items", [False, True])
def test_an_output_with_a_loss_stands_for_it(kind, items):
    model, twin, xy = network(), network(), data()

    def output(m):
        logits = model(m[0])
        return kind(loss=F.mse_loss(logits, m[1]), logits=logits)

    def loss_fn(m):
        return (output(m), torch.tensor(len(m[0]))) if items else output(m)

    loss_of(twin, *xy).backward()
    bb.backward(loss_fn, xy, micro_batch=5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)
    assert bb.audit(loss_fn, model, xy, micro_batch=5).exact
    assert bb.plan(loss_fn, xy).micro_batch == 12
    model.zero_grad()
    acc = bb.Accumulator(sgd(model), every=1)
    assert acc.backward(output(xy), items=12).skipped is None
    sgd(twin).step()
    agree(model, twin)
