"""The stream door: optimizers and their helpers as people combine them, errors inside a window, checkpoints."""

import dataclasses
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch.torch as bb


class Passes(TorchDispatchMode):
    """Counts the passes that multiply a list of gradients."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_foreach_mul_"
        return func(*args, **(kwargs or {}))


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def data(n=32, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return torch.randn(n, 4).to(dtype), torch.randn(n, 1).to(dtype)


def loss_of(model, x, y):
    return F.mse_loss(model(x), y)


def feed(acc, model, x, y, size=4):
    return [acc.backward(loss_of(model, a, b), items=len(a)) for a, b in zip(x.split(size), y.split(size), strict=True)]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other, strict=True))


# When a window closes.


def test_every_as_a_callable_of_the_update():
    model = network()
    acc = bb.Accumulator(sgd(model), every=lambda k: k + 1)
    closed = [update is not None for update in feed(acc, model, *data(24))]
    assert closed == [True, False, True, False, False, True]
    assert acc.index == 3


def test_a_callable_that_gives_nonsense_is_refused_before_anything_moves():
    model = network()
    acc = bb.Accumulator(sgd(model), every=lambda k: 0)
    with pytest.raises(ValueError, match=r"every must be at least 1. Received: every=0 \(int\)"):
        feed(acc, model, *data(4))
    assert all(p.grad is None for p in model.parameters())


def test_every_as_items():
    model = network()
    acc = bb.Accumulator(sgd(model), every=bb.items(10))
    updates = feed(acc, model, *data(32))
    assert [u.items for u in updates if u] == [12, 12]
    assert acc.pending == 2
    assert acc.flush().items == 8
    assert repr(bb.items(10)) == "items(10)"
    with pytest.raises(TypeError, match=r"every=items\(10\) counts on the host"):
        acc.backward(loss_of(model, *data(4)), items=torch.tensor(4))


@pytest.mark.parametrize("count", [0, -1, float("nan"), True, "many"])
def test_items_are_checked(count):
    with pytest.raises((TypeError, ValueError), match="items must be"):
        bb.items(count)


@pytest.mark.parametrize(
    ("sizes", "clip_norm", "passes"),
    [((4, 4, 4, 4), None, 0), ((3, 5, 4, 4), None, 1), ((3, 5, 4, 4), 1e-3, 1), ((4, 4, 4, 4), 1e9, 0)],
)
def test_at_most_one_pass_over_the_gradients_and_none_when_equal(sizes, clip_norm, passes):
    model = network()
    acc = bb.Accumulator(sgd(model, foreach=False), every=4, clip_norm=clip_norm)
    x, y = data(16)
    with Passes() as counted:
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
            acc.backward(loss_of(model, a, b), items=len(a))
    assert counted.count == passes
    assert acc.index == 1


# What it is combined with.


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_optimizer(kind):
    ours, theirs = network(), network()
    optimizer = kind(theirs.parameters(), lr=1e-2)
    acc = bb.Accumulator(kind(ours.parameters(), lr=1e-2), every=4)
    for k in range(3):
        x, y = data(16, seed=k)
        feed(acc, ours, x, y)
        loss_of(theirs, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_half_precision_parameters_with_each_implementation_of_adamw(dtype, implementation):
    model = network(dtype)
    acc = bb.Accumulator(torch.optim.AdamW(model.parameters(), lr=0.1, **implementation), every=4)
    before = weights(model)
    update = feed(acc, model, *data(16, dtype))[-1]
    assert update.skipped is None
    assert not same(model, before)
    assert all(p.dtype == dtype and p.grad is None for p in model.parameters())


def test_several_groups_and_parameters_without_gradients():
    model, unused = network(), nn.Parameter(torch.ones(3).double())
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": [*model[2].parameters(), unused]}], weight_decay=0.5
    )
    acc = bb.Accumulator(optimizer, every=2)
    feed(acc, model, *data(8))
    assert torch.equal(unused, torch.ones(3).double())
    assert unused not in optimizer.state


def test_parameters_thawed_and_added_later():
    ours, theirs = network(), network()
    x, y = data(16)
    results = []
    for model, step in ((ours, None), (theirs, torch.optim.SGD)):
        for p in model[0].parameters():
            p.requires_grad_(False)
        optimizer = sgd(model)
        acc = bb.Accumulator(optimizer, every=4)
        for thaw in (False, True):
            if thaw:
                for p in model[0].parameters():
                    p.requires_grad_(True)
                scale = nn.Parameter(torch.ones(1).double())
                optimizer.add_param_group({"params": [scale]})
            if step is None:
                feed(acc, model, x, y)
            else:
                loss_of(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(weights(model))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)


def test_scheduler_once_an_update_and_never_for_a_skipped_one():
    model = network()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    acc = bb.Accumulator(optimizer, every=4, scheduler=scheduler)
    x, y = data(16)
    feed(acc, model, x, y)
    assert scheduler.last_epoch == 1
    y[3] = float("nan")
    assert feed(acc, model, x, y)[-1].skipped.startswith("the window is not finite: loss nan")
    assert scheduler.last_epoch == 1
    assert acc.index == 1


def scaled(model, acc_scale=2.0**8):
    scaler = torch.amp.GradScaler("cpu", init_scale=acc_scale, growth_interval=2)
    return scaler, bb.Accumulator(sgd(model), every=4, scaler=scaler, clip_norm=0.5)


def test_grad_scaler_unscales_once_and_equals_the_scaled_full_batch():
    ours, theirs = network(torch.float32), network(torch.float32)
    scaler, acc = scaled(ours)
    reference, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2), sgd(theirs)
    for k in range(3):
        x, y = data(16, torch.float32, seed=k)
        assert feed(acc, ours, x, y)[-1].skipped is None
        reference.scale(loss_of(theirs, x, y)).backward()
        reference.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step(optimizer)
        reference.update()
        optimizer.zero_grad()
    assert scaler.state_dict() == reference.state_dict()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_grad_scaler_overflow_skips_the_window_backs_off_and_leaves_no_trace():
    model = network(torch.float32)
    scaler, acc = scaled(model)
    before = weights(model)
    x, y = data(16, torch.float32)
    y[5] = float("inf")
    assert "not finite" in feed(acc, model, x, y)[-1].skipped
    assert same(model, before)
    assert scaler.get_scale() == 2.0**7
    assert feed(acc, model, *data(16, torch.float32))[-1].skipped is None


def test_a_disabled_scaler_does_nothing():
    model, bare = network(), network()
    acc = bb.Accumulator(sgd(model), every=4, scaler=torch.amp.GradScaler("cpu", enabled=False))
    other = bb.Accumulator(sgd(bare), every=4)
    feed(acc, model, *data(16))
    feed(other, bare, *data(16))
    assert same(model, weights(bare))


def test_sparse_gradients_under_clipping():
    table = nn.Embedding(30, 3, sparse=True).double()
    other = nn.Embedding(30, 3).double()
    other.load_state_dict(table.state_dict())
    ids = torch.tensor([3, 3, 29, 0, 3, 0, 7, 29])
    acc = bb.Accumulator(torch.optim.SGD(table.parameters(), lr=1.0), every=4, clip_norm=0.05)
    for part in ids.split(2):
        update = acc.backward(table(part).pow(2).mean(), items=2)
    other(ids).pow(2).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    assert update.grad_norm == pytest.approx(norm.item(), rel=1e-12)
    torch.testing.assert_close(table.weight, other.weight, rtol=1e-12, atol=1e-12)


def test_two_accumulators_take_turns():
    """A window of one does not see the gradients of another's, as long as their losses reach different parameters."""
    a, b = network(), network()
    accs = [bb.Accumulator(sgd(a), every=4), bb.Accumulator(sgd(b), every=4)]
    x, y = data(16)
    for part in zip(x.split(4), y.split(4), strict=True):
        for acc, model in zip(accs, (a, b), strict=True):
            acc.backward(loss_of(model, *part), items=4)
    assert same(a, weights(b))


# Errors.


def test_an_error_in_the_users_forward_leaves_the_window_as_it_was():
    model, undisturbed = network(), network()
    acc, other = bb.Accumulator(sgd(model), every=4), bb.Accumulator(sgd(undisturbed), every=4)
    x, y = data(16)
    feed(acc, model, x[:8], y[:8])
    with pytest.raises(RuntimeError):
        loss_of(model, x[:, :3], y)
    assert acc.pending == 2
    feed(acc, model, x[8:], y[8:])
    feed(other, undisturbed, x, y)
    assert same(model, weights(undisturbed))


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("inside the backward")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_error_in_autograd_drops_the_window_and_the_next_is_clean(dtype):
    model, undisturbed = network(dtype), network(dtype)
    acc, other = bb.Accumulator(sgd(model), every=2), bb.Accumulator(sgd(undisturbed), every=2)
    x, y = data(8, dtype)
    feed(acc, model, x[:4], y[:4])
    with pytest.raises(RuntimeError, match="inside the backward"):
        acc.backward(model[2](Fails.apply(model[:2](x))).mean(), items=8)
    assert acc.pending == 0
    assert all(p.grad is None for p in model.parameters())
    feed(acc, model, x, y)
    feed(other, undisturbed, x, y)
    assert same(model, weights(undisturbed))


@pytest.mark.parametrize("with_scaler", [False, True])
def test_an_error_in_the_optimizer_drops_the_window_and_the_next_is_clean(with_scaler):
    model, undisturbed = network(torch.float32), network(torch.float32)
    make = scaled if with_scaler else lambda m: (None, bb.Accumulator(sgd(m), every=4))
    (_, acc), (_, other) = make(model), make(undisturbed)

    def fail(*_):
        raise RuntimeError("disk full")

    handle = acc.optimizer.register_step_pre_hook(fail)
    x, y = data(16, torch.float32)
    with pytest.raises(RuntimeError, match="disk full"):
        feed(acc, model, x, y)
    handle.remove()
    assert (acc.pending, acc.index) == (0, 0)
    feed(acc, model, x, y)
    feed(other, undisturbed, x, y)
    assert same(model, weights(undisturbed))


def test_bad_items_inside_a_window_change_nothing():
    model, undisturbed = network(), network()
    acc, other = bb.Accumulator(sgd(model), every=4), bb.Accumulator(sgd(undisturbed), every=4)
    x, y = data(16)
    feed(acc, model, x[:8], y[:8])
    for bad in (-1, 0, float("nan"), "4", None, True, torch.ones(2)):
        with pytest.raises((TypeError, ValueError), match="items must be"):
            acc.backward(loss_of(model, x[:4], y[:4]), items=bad)
    for loss in (torch.ones(3, requires_grad=True), torch.tensor(1.0), torch.tensor(1), 1.0):
        with pytest.raises(ValueError, match="The loss"):
            acc.backward(loss, items=4)
    feed(acc, model, x[8:], y[8:])
    feed(other, undisturbed, x, y)
    assert same(model, weights(undisturbed))


def test_nonfinite_windows_as_asked_for():
    x, y = data(16)
    y[3] = float("nan")
    model = network()
    acc = bb.Accumulator(sgd(model), every=4, nonfinite="raise")
    before = weights(model)
    with pytest.raises(FloatingPointError, match="The parameters and the optimizer are as they were"):
        feed(acc, model, x, y)
    assert same(model, before)
    assert acc.pending == 0
    acc = bb.Accumulator(sgd(model), every=4, nonfinite="apply")
    assert feed(acc, model, x, y)[-1].skipped is None
    assert all(p.isnan().any() for p in model.parameters())


def test_a_window_without_items_makes_no_update():
    model = network()
    acc = bb.Accumulator(sgd(model), every=2)
    before = weights(model)
    x, y = data(4)
    for _ in range(2):
        update = acc.backward(loss_of(model, x, y), items=torch.tensor(0))
    assert update.skipped == "the window holds no items"
    assert same(model, before)


def test_a_loss_of_other_parameters_makes_no_update():
    model, other = network(), network()
    update = bb.Accumulator(sgd(model), every=1).backward(loss_of(other, *data(4)), items=4)
    assert update.skipped == "no parameter of the optimizer got a gradient"


def test_inside_no_grad_a_loss_made_outside_it_still_counts():
    model = network()
    loss = loss_of(model, *data(4))
    with torch.no_grad():
        assert bb.Accumulator(sgd(model), every=1).backward(loss, items=4).skipped is None


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"optimizer": None}, TypeError, r"optimizer must be a torch.optim.Optimizer. Received: optimizer=None"),
        ({"every": "64"}, TypeError, r"every must be an integer, .* Received: every='64' \(str\)"),
        ({"clip_norm": 0}, ValueError, r"clip_norm must be positive and finite. Received: clip_norm=0 \(int\)"),
        ({"clip_norm": "1"}, TypeError, "clip_norm must be a number or None"),
        ({"partial": "aply"}, ValueError, "partial must be one of 'apply', 'carry', 'drop'. Received: partial='aply'"),
        ({"nonfinite": None}, ValueError, "nonfinite must be one of 'skip', 'raise', 'apply'"),
        ({"scheduler": 0.1}, TypeError, "scheduler must have a step method"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(arguments, kind, message):
    with pytest.raises(kind, match=message):
        bb.Accumulator(**{"optimizer": sgd(network()), "every": 4, **arguments})


def test_what_cannot_be_driven_is_refused_with_the_reason():
    model = network()
    with pytest.raises(ValueError, match="LBFGS evaluates the loss again inside its step"):
        bb.Accumulator(torch.optim.LBFGS(model.parameters()), every=4)
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs a metric"):
        bb.Accumulator(optimizer, every=4, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match=r"scaler unscales gradients .* parameters of torch.float16"):
        bb.Accumulator(sgd(network(torch.float16)), every=4, scaler=torch.amp.GradScaler("cpu"))
    optimizer.param_groups[0]["params"].clear()
    with pytest.raises(ValueError, match="The optimizer has no parameters"):
        bb.Accumulator(optimizer, every=4)


# What it says, and what it keeps.


def test_update_is_plain_numbers():
    model = network()
    update = feed(bb.Accumulator(sgd(model), every=4), model, *data(16))[-1]
    fields = dataclasses.asdict(update)
    assert list(fields) == ["index", "micro_batches", "items", "loss", "grad_norm", "skipped", "noise"]
    assert all(type(value) in (int, float, type(None)) for value in fields.values())


def test_repr():
    model = network()
    acc = bb.Accumulator(sgd(model), every=4, clip_norm=1.0, scaler=torch.amp.GradScaler("cpu"))
    feed(acc, model, *data(20))
    assert repr(acc) == (
        "Accumulator(SGD, every=4, clip_norm=1.0, scaler=GradScaler: 1 updates made, 1 micro-batches pending)"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_state_loads_without_running_code_inside_a_window(dtype, sparse):
    def make():
        torch.manual_seed(0)
        table = nn.Embedding(20, 3, sparse=sparse).to(dtype)
        return table, bb.Accumulator(torch.optim.SGD(table.parameters(), lr=1.0), every=4)

    def go(table, acc, parts):
        for part in parts:
            acc.backward(table(part).float().pow(2).mean(), items=torch.tensor(len(part)))

    parts = torch.arange(19).remainder(7).split((5, 4, 8, 2))
    straight, acc = make()
    go(straight, acc, parts)
    before, acc = make()
    go(before, acc, parts[:2])
    file = io.BytesIO()
    torch.save({"acc": acc.state_dict(), "table": before.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    after, acc = make()
    after.load_state_dict(state["table"])
    acc.load_state_dict(state["acc"])
    assert acc.pending == 2
    go(after, acc, parts[2:])
    assert acc.index == 1
    assert torch.equal(after.weight, straight.weight)


def test_a_loaded_state_is_a_copy():
    model = network()
    acc = bb.Accumulator(sgd(model), every=4)
    x, y = data(16)
    feed(acc, model, x[:8], y[:8])
    state = acc.state_dict()
    kept = {i: g.clone() for i, g in state["window"]["gradients"].items()}
    acc.load_state_dict(state)
    feed(acc, model, x[8:12], y[8:12])
    assert all(torch.equal(state["window"]["gradients"][i], g) for i, g in kept.items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"index": 0, "shapes": [(2, 2)], "window": None}, "The state is of other parameters. Received: shapes"),
        ({"state": {}, "param_groups": []}, r"The state is not an Accumulator's. Received: keys \['param_groups', 's"),
    ],
)
def test_the_state_of_something_else_is_refused(state, message):
    model = network()
    acc = bb.Accumulator(sgd(model), every=4)
    feed(acc, model, *data(4))
    with pytest.raises(ValueError, match=message):
        acc.load_state_dict(state)
    assert acc.pending == 1


def test_reset_forgets_the_window():
    model = network()
    acc = bb.Accumulator(sgd(model), every=4)
    feed(acc, model, *data(8))
    acc.reset()
    assert (acc.pending, acc.index) == (0, 0)
    assert acc.flush() is None
    assert all(p.grad is None for p in model.parameters())
