"""Who owns `.grad`: what others do to an open window's gradients is refused, never mixed in."""

import contextlib
import copy
import functools
import gc
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import bigbatch.torch as bb

SIZES = (5, 1, 4, 2)  # 12 examples


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def data(dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(12, width, generator=generator, dtype=torch.float64).to(dtype) for width in (4, 1))


def parts(xy):
    return list(zip(*(t.split(SIZES) for t in xy), strict=True))


def loss_of(model, x, y):
    return F.mse_loss(model(x), y)


def feed(acc, model, xy):
    for x, y in parts(xy):
        acc.backward(loss_of(model, x, y), items=len(x))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def stepped(model, optimizer, xy):
    """The full batch's update by plain PyTorch, of copies."""
    twin = copy.deepcopy(model)
    own = type(optimizer)(twin.parameters(), lr=0.1, **({"momentum": 0.9} if "momentum" in optimizer.defaults else {}))
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    own.zero_grad()
    loss_of(twin, *xy).backward()
    own.step()
    return weights(twin)


def agree(model, expected, tolerance=1e-12):
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=tolerance, atol=tolerance)


def momenta(optimizer):
    return [state["momentum_buffer"].clone() for state in optimizer.state.values()]


def other_backward(model, optimizer):
    loss_of(model, *data(next(model.parameters()).dtype, seed=9)).backward()


def write_to_a_gradient(change, model, _):
    for p in model.parameters():
        if p.grad is not None:
            change(p.grad)
            return


def write_to_a_parameter(model, _):
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)


def other_step(model, _):
    torch.optim.AdamW(model.parameters()).step()


def second_accumulator(model, optimizer):
    acc = bb.Accumulator(optimizer, every=7)
    acc.backward(loss_of(model, *data(next(model.parameters()).dtype, seed=9)), items=12)


def second_call(model, _):
    bb.backward(lambda m: loss_of(model, *m), data(next(model.parameters()).dtype, seed=9), micro_batch=5)


ACTS = {
    "zero_grad": lambda m, o: o.zero_grad(),
    "zero_grad(set_to_none=False)": lambda m, o: o.zero_grad(set_to_none=False),
    "zero_grad of a part": lambda m, o: m[2].zero_grad(),
    "step": lambda m, o: o.step(),
    "step of others": other_step,
    "step by a scaler": lambda m, o: torch.amp.GradScaler("cpu", enabled=False).step(o),
    "backward": other_backward,
    "backward after zero_grad": lambda m, o: (o.zero_grad(), other_backward(m, o)),
    "clip_grad_norm_": lambda m, o: torch.nn.utils.clip_grad_norm_(m.parameters(), 1e-3),
    "clip_grad_value_": lambda m, o: [
        torch.nn.utils.clip_grad_value_(p, 1e-4) for p in m.parameters() if p.grad is not None
    ],
    "in-place write": functools.partial(write_to_a_gradient, lambda grad: grad.mul_(2)),
    "in-place write of zeros": functools.partial(write_to_a_gradient, lambda grad: grad.zero_()),
    "in-place write of nothing": functools.partial(write_to_a_gradient, lambda grad: grad.add_(0)),
    "in-place write to a parameter": write_to_a_parameter,
    "Accumulator": second_accumulator,
    "bb.backward": second_call,
}


def run_window(act, place, model, optimizer, acc, xy):
    """A window with the act before micro-batch `place`; what the act left of the parameters, and the error."""
    left = None
    try:
        for k, (x, y) in enumerate(parts(xy)):
            if k == place:
                try:
                    act(model, optimizer)
                finally:
                    left = weights(model), momenta(optimizer)
            acc.backward(loss_of(model, x, y), items=len(x))
    except (RuntimeError, UserWarning) as error:
        return left, error
    return left, None


@pytest.mark.filterwarnings("ignore:Gradients lay")
@pytest.mark.parametrize("wide", [False, True], ids=["in .grad", "wide"])
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("name", ACTS)
def test_an_act_of_others_in_a_streamed_window(name, place, wide):
    model = network(torch.float32 if wide else torch.float64)
    dtype, tolerance = (torch.float32, 1e-5) if wide else (torch.float64, 1e-12)
    optimizer = sgd(model)
    acc = bb.Accumulator(optimizer, every=4, dtype=torch.float64 if wide else torch.float32)
    xy = data(dtype)
    for x, y in parts(xy):  # so that the optimizer has a state that could move
        acc.backward(loss_of(model, x, y), items=len(x))
    start = weights(model)
    expected = stepped(model, optimizer, xy)
    left, error = run_window(ACTS[name], place, model, optimizer, acc, xy)
    if error is None:
        if place or "parameter" not in name:  # before a window opens anybody may move a parameter
            agree(model, expected, tolerance)
    else:
        assert name.split()[0] in str(error), error
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), left[0], strict=True))
        assert all(torch.equal(p, q) for p, q in zip(momenta(optimizer), left[1], strict=True))
        if name != "in-place write to a parameter":
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert acc.pending == 0
    expected = stepped(model, optimizer, xy)
    for x, y in parts(xy):
        acc.backward(loss_of(model, x, y), items=len(x))
    agree(model, expected, tolerance)


@pytest.mark.parametrize("name", ACTS)
def test_an_act_that_would_spoil_the_window_is_refused(name):
    """Where sums lie in `.grad` every act inside a window is an error, not luck."""
    model = network()
    optimizer = sgd(model)
    acc = bb.Accumulator(optimizer, every=4)
    _, error = run_window(ACTS[name], 2, model, optimizer, acc, data())
    assert isinstance(error, RuntimeError)
    assert "dropped" in str(error)


@pytest.mark.parametrize("name", [name for name in ACTS if name != "zero_grad of a part"])
def test_the_same_before_a_flush(name):
    model = network()
    optimizer = sgd(model)
    acc = bb.Accumulator(optimizer, every=4)
    before = weights(model)
    for x, y in parts(data())[:2]:
        acc.backward(loss_of(model, x, y), items=len(x))

    def act_and_flush():
        ACTS[name](model, optimizer)
        acc.flush()

    with pytest.raises(RuntimeError, match="dropped"):
        act_and_flush()
    assert acc.pending == acc.index == 0
    if name != "in-place write to a parameter":
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("call", ["state_dict", "flush carried"])
def test_a_spoilt_window_is_not_saved_or_carried(call):
    model = network()
    acc = bb.Accumulator(sgd(model), every=4, partial="carry")
    x, y = data()
    acc.backward(loss_of(model, x, y), items=12)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="zero_grad"):
        acc.state_dict() if call == "state_dict" else acc.flush()
    assert acc.pending == 0


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("name", ACTS)
def test_an_act_of_others_inside_a_loss_fn(name, place):
    model = network()
    optimizer = sgd(model)
    x, y = data()
    held = torch.full_like(model[0].weight, 0.5)
    model[0].weight.grad = held
    before, calls, left = weights(model), [], []

    def loss_fn(m):
        calls.append(0)
        if len(calls) == place + 1:
            try:
                ACTS[name](model, optimizer)
            finally:
                left.extend(weights(model))
        return loss_of(model, *m)

    with pytest.raises(RuntimeError, match=re.escape(name.split()[0])):
        bb.backward(loss_fn, (x, y), micro_batch=3)
    assert model[0].weight.grad is held
    assert torch.equal(held, torch.full_like(held, 0.5))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), left, strict=True))
    if name != "in-place write to a parameter":
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    expected = stepped(model, optimizer, (x, y))
    bb.backward(lambda m: loss_of(model, *m), (x, y), micro_batch=5)
    optimizer.step()
    agree(model, expected)


# Gradients that lie there.


def test_gradients_that_lie_there_are_discarded_with_one_warning():
    model = network()
    optimizer = sgd(model)
    acc = bb.Accumulator(optimizer, every=4)
    xy = data()
    for k in range(2):
        expected = stepped(model, optimizer, xy)
        other_backward(model, optimizer)
        with pytest.warns(UserWarning, match="Gradients lay in .grad") if k == 0 else contextlib.nullcontext():
            for x, y in parts(xy):
                acc.backward(loss_of(model, x, y), items=len(x))
        agree(model, expected)


def test_where_warnings_are_errors_the_window_is_not_opened():
    model = network()
    optimizer = sgd(model)
    acc = bb.Accumulator(optimizer, every=4)
    other_backward(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            acc.backward(loss_of(model, *data()), items=12)
    assert acc.pending == 0
    optimizer.step()  # nobody's window is open
    expected = stepped(model, optimizer, data())
    for x, y in parts(data()):
        acc.backward(loss_of(model, x, y), items=len(x))
    agree(model, expected)


def test_what_a_split_call_leaves_does_not_enter_a_window():
    model = network()
    optimizer = sgd(model)
    bb.backward(lambda m: loss_of(model, *m), data(), micro_batch=5)
    optimizer.step()
    expected = stepped(model, optimizer, data())
    acc = bb.Accumulator(optimizer, every=4)
    with pytest.warns(UserWarning, match="bb.backward"):
        feed(acc, model, data())
    agree(model, expected)


# What others may do.


def look(model, other, x, y):
    """A saliency map, a double backward, a functional gradient, and another model's backward, whose graph stays."""
    image = x.clone().requires_grad_()
    torch.autograd.grad(loss_of(model, image, y), image)
    loss = loss_of(model, x, y)
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), list(model.parameters()), allow_unused=True)
    values = dict(model.named_parameters())
    torch.func.grad(lambda v: F.mse_loss(torch.func.functional_call(model, v, (x,)), y))(values)
    loss_of(other, x, y).backward(retain_graph=True)
    other.zero_grad()
    with torch.no_grad():
        model(x)
    torch.optim.SGD(other.parameters(), lr=0.1).step()


@pytest.mark.parametrize("api", ["stream", "split"])
def test_what_does_not_touch_the_gradients_is_allowed(api):
    model, other = network(), network()
    optimizer, xy = sgd(model), data()
    expected = stepped(model, optimizer, xy)
    if api == "stream":
        acc = bb.Accumulator(optimizer, every=4)
        for x, y in parts(xy):
            look(model, other, x, y)
            loss = loss_of(model, x, y)
            look(model, other, x, y)
            acc.backward(loss, items=len(x))
    else:
        bb.backward(lambda m: (look(model, other, *m), loss_of(model, *m))[1], xy, micro_batch=5)
        optimizer.step()
    agree(model, expected)


def test_parameters_frozen_and_thawed_inside_a_window():
    """Each gradient is over the micro-batches in which its parameter was not frozen, as in a loop by PyTorch."""
    model, twin = network(), network()
    optimizer, theirs = sgd(model), sgd(twin)
    acc = bb.Accumulator(optimizer, every=4)
    for k, (x, y) in enumerate(parts(data())):
        for m in (model, twin):
            m[0].weight.requires_grad_(k % 2 == 1)
        acc.backward(loss_of(model, x, y), items=len(x))
        (loss_of(twin, x, y) * len(x) / 12).backward()
    theirs.step()
    agree(model, weights(twin))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_windows(reentrant):
    model = network()
    optimizer, xy = sgd(model), data()
    expected = stepped(model, optimizer, xy)
    acc = bb.Accumulator(optimizer, every=4)
    for x, y in parts(xy):
        inner = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        acc.backward(F.mse_loss(inner, y), items=len(x))
    agree(model, expected)


def test_a_table_that_its_own_forward_shortens():
    """max_norm writes to the weight in each forward, which is no write of others; the full batch's does the same."""

    def table():
        torch.manual_seed(0)
        return nn.Embedding(9, 3, max_norm=0.7, dtype=torch.float64)

    ids, ours, twin = torch.arange(12) * 5 % 9, table(), table()
    acc = bb.Accumulator(torch.optim.SGD(ours.parameters(), lr=0.1), every=4)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        for part in ids.split(3):
            acc.backward(ours(part).square().mean() + ours(part).sum(), items=3)
        theirs.zero_grad()
        (twin(ids).square().mean() + twin(ids).sum() / 4).backward()
        theirs.step()
        assert acc.pending == 0
    torch.testing.assert_close(ours.weight, twin.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_tied_sparse_table_whose_gradient_autograd_replaces(sparse):
    """Sparse and then dense: `.grad` is another tensor after the backward, and that is autograd's own doing."""
    torch.manual_seed(0)
    table = nn.Embedding(7, 3, sparse=sparse, dtype=torch.float64)
    twin = copy.deepcopy(table)
    acc = bb.Accumulator(torch.optim.SGD(table.parameters(), lr=0.1), every=3)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1)
    ids = torch.tensor([1, 4])
    for k in range(3):
        for m, take in ((table, acc.backward), (twin, None)):
            loss = m(ids).square().sum() if k != 1 else m.weight.square().sum()
            take(loss, items=1) if take else (loss / 3).backward()
    theirs.step()
    torch.testing.assert_close(table.weight, twin.weight, rtol=1e-12, atol=1e-12)


def test_the_optimizers_parameters_may_not_change_inside_a_window():
    model, late = network(), nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer, xy = sgd(model), data()
    acc = bb.Accumulator(optimizer, every=4)
    *first, (x, y) = parts(xy)
    for part in first:
        acc.backward(loss_of(model, *part) * late, items=len(part[0]))
    optimizer.add_param_group({"params": [late]})
    with pytest.raises(RuntimeError, match="param_groups"):
        acc.backward(loss_of(model, x, y) * late, items=len(x))
    assert (acc.index, late.item(), late.grad) == (0, 1, None)
    acc.backward(loss_of(model, *xy) * late, items=12)
    assert acc.pending == 1


def test_a_window_may_be_collected_in_the_middle_of_another_optimizers_step():
    """PyTorch goes through the hooks before a step then, and an error would be the other optimizer's."""
    gc.collect()  # other tests' windows
    before, model = len(_global_optimizer_pre_hooks), network()
    acc = bb.Accumulator(sgd(model), every=4)
    acc.backward(loss_of(model, *data()), items=12)
    acc.itself = acc  # so that only the garbage collector frees it
    del acc

    def collect(*_):
        gc.collect()

    handles = [
        register_optimizer_step_pre_hook(hook) for hook in (collect, lambda *_: None)
    ]  # it goes on to the second
    other = nn.Parameter(torch.ones(()))
    other.grad = torch.ones(())
    torch.optim.SGD([other], lr=0.5).step()
    for handle in handles:
        handle.remove()
    assert other.item() == 0.5
    again = bb.Accumulator(sgd(model), every=1)
    model.zero_grad()
    again.backward(loss_of(model, *data()), items=12)
    assert len(_global_optimizer_pre_hooks) == before


def test_nothing_stays_behind():
    """Neither PyTorch's hooks before a step, nor a window of an Accumulator that is gone."""
    model = network()
    optimizer = sgd(model)
    before = len(_global_optimizer_pre_hooks)
    acc = bb.Accumulator(optimizer, every=4)
    acc.backward(loss_of(model, *data()), items=12)
    assert len(_global_optimizer_pre_hooks) == before + 1
    del acc
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == before
    optimizer.zero_grad()
    acc = bb.Accumulator(optimizer, every=1)
    for _ in range(3):
        acc.backward(loss_of(model, *data()), items=12)
    with pytest.raises(ValueError, match="items"):
        acc.backward(loss_of(model, *data()), items=0)
    acc.reset()
    assert len(_global_optimizer_pre_hooks) == before
    optimizer.step()


def test_a_state_loaded_into_another_accumulator_takes_the_window_over():
    model = network()
    optimizer, xy = sgd(model), data()
    expected = stepped(model, optimizer, xy)
    first = bb.Accumulator(optimizer, every=4)
    for x, y in parts(xy)[:2]:
        first.backward(loss_of(model, x, y), items=len(x))
    second = bb.Accumulator(optimizer, every=4)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for x, y in parts(xy)[2:]:
        second.backward(loss_of(model, x, y), items=len(x))
    agree(model, expected)
    with pytest.raises(RuntimeError, match="Accumulator"):
        first.flush()
    agree(model, expected)


def test_a_state_may_be_loaded_before_its_model():
    model = network()
    optimizer, xy = sgd(model), data()
    acc = bb.Accumulator(optimizer, every=4)
    for x, y in parts(xy)[:2]:
        acc.backward(loss_of(model, x, y), items=len(x))
    state, own = copy.deepcopy(acc.state_dict()), copy.deepcopy(model.state_dict())
    expected = stepped(model, optimizer, xy)
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    acc = bb.Accumulator(sgd(other), every=4)
    acc.load_state_dict(state)
    other.load_state_dict(own)
    for x, y in parts(xy)[2:]:
        acc.backward(loss_of(other, x, y), items=len(x))
    agree(other, expected)


# Hooks after the accumulation.


@pytest.mark.parametrize("api", ["stream", "split"])
@pytest.mark.parametrize(
    ("hook", "moved"),
    [
        (lambda p: torch.optim.SGD([p], lr=0.1).step(), 0),
        (lambda p: (torch.optim.SGD([p], lr=0.1).step(), setattr(p, "grad", None)), 0),
        (lambda p: (p.data.sub_(p.grad), setattr(p, "grad", None)), 1),
        (lambda p: setattr(p, "grad", None), 0),
        (lambda p: p.grad.clamp_(-1, 1), 0),
        (lambda p: setattr(p, "grad", p.grad * 0.5), 0),
    ],
    ids=["step", "step and drop", "by hand", "drop", "clip", "replace"],
)
def test_a_hook_that_writes_is_refused_before_a_second_parameter_moves(api, hook, moved):
    model = network()
    optimizer = sgd(model)
    before = weights(model)
    handles = [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]
    acc = bb.Accumulator(optimizer, every=4)
    calls = {
        "stream": lambda: acc.backward(loss_of(model, *data()), items=12),
        "split": lambda: bb.backward(lambda m: loss_of(model, *m), data(), micro_batch=5),
    }
    with pytest.raises(RuntimeError, match="hook"):
        calls[api]()
    assert sum(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) == moved
    assert acc.pending == 0
    assert all(p.grad is None for p in model.parameters())
    for handle in handles:  # they are the user's again
        handle.remove()
    expected = stepped(model, optimizer, data())
    for x, y in parts(data()):
        acc.backward(loss_of(model, x, y), items=len(x))
    agree(model, expected)


def test_an_optimizer_in_a_hook_on_the_accumulation_itself_is_refused():
    model = network()
    before = weights(model)
    nodes = [p.view_as(p).grad_fn.next_functions[0][0] for p in model.parameters()]
    for node, p in zip(nodes, model.parameters(), strict=True):
        node.register_hook(lambda *_, p=p: torch.optim.SGD([p], lr=0.1).step())
    with pytest.raises(RuntimeError, match=r"step\(\) was called inside an open window"):
        bb.Accumulator(sgd(model), every=4).backward(loss_of(model, *data()), items=12)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("api", ["stream", "split"])
def test_a_hook_that_reads_is_called_once_a_micro_batch(api):
    model, seen = network(), []
    optimizer, xy = sgd(model), data()
    expected = stepped(model, optimizer, xy)
    handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    if api == "stream":
        acc = bb.Accumulator(optimizer, every=4)
        for x, y in parts(xy):
            acc.backward(loss_of(model, x, y), items=len(x))
    else:
        bb.backward(lambda m: loss_of(model, *m), xy, micro_batch=3)
        optimizer.step()
    agree(model, expected)
    assert len(seen) == 4
    handle.remove()
    loss_of(model, *xy).backward()
    assert len(seen) == 4


# Scalers.


def scaled_window(model, acc, scaler, xy, act=None):
    for k, (x, y) in enumerate(parts(xy)):
        if k == 2 and act is not None:
            act()
        acc.backward(loss_of(model, x, y), items=len(x))


@pytest.mark.parametrize("name", ["unscale_", "step", "update", "update(scale)"])
def test_a_scalers_calls_inside_a_window_are_refused_and_the_next_is_clean(name):
    model = network(torch.float32)
    optimizer, xy = sgd(model), data(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    acc = bb.Accumulator(optimizer, every=4, scaler=scaler)
    before = weights(model)
    act = {
        "unscale_": lambda: scaler.unscale_(optimizer),
        "step": lambda: scaler.step(optimizer),
        "update": lambda: (scaler.unscale_(optimizer), scaler.update()),
        "update(scale)": lambda: scaler.update(2.0**9),
    }[name]
    with pytest.raises(RuntimeError, match=name.split("(")[0]):
        scaled_window(model, acc, scaler, xy, act)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    expected = stepped(model, optimizer, xy)
    scaled_window(model, acc, scaler, xy)
    agree(model, expected, 1e-5)


def test_a_scaler_that_two_windows_share_may_not_change_inside_one():
    a, b = network(torch.float32), network(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1)
    accs = [bb.Accumulator(sgd(m), every=4, scaler=scaler) for m in (a, b)]
    xy, before = data(torch.float32), weights(b)
    accs[1].backward(loss_of(b, *xy), items=12)
    scaled_window(a, accs[0], scaler, xy)  # its update makes the scale larger
    for _ in range(2):
        accs[1].backward(loss_of(b, *xy), items=12)
    with pytest.raises(RuntimeError, match=r"scaler.update\(\)"):
        accs[1].backward(loss_of(b, *xy), items=12)
    assert all(torch.equal(p, q) for p, q in zip(b.parameters(), before, strict=True))


# The weights' products, which others see in `.grad` only in part.


@pytest.mark.filterwarnings("ignore:Gradients lay")
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("name", ACTS)
def test_an_act_of_others_where_weights_are_fused(name, place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)).double()
    optimizer = sgd(model)
    acc = bb.Accumulator(optimizer, every=4)
    act = ACTS[name]
    if name in ("backward", "Accumulator", "bb.backward", "backward after zero_grad"):

        def act(model, optimizer):
            x = torch.ones(3, 512, dtype=torch.float64)
            if name == "Accumulator":
                bb.Accumulator(optimizer, every=7).backward(model(x).square().mean(), items=3)
            elif name == "bb.backward":
                bb.backward(lambda m: model(m).square().mean(), x, micro_batch=1)
            else:
                if "zero_grad" in name:
                    optimizer.zero_grad()
                model(x).square().mean().backward()

    generator = torch.Generator().manual_seed(3)
    xy = tuple(torch.randn(12, 512, generator=generator, dtype=torch.float64) for _ in range(2))
    for x, y in parts(xy):
        acc.backward(loss_of(model, x, y), items=len(x))
    expected = stepped(model, optimizer, xy)
    left, error = run_window(act, place, model, optimizer, acc, xy)
    if error is None and not (place == 0 and "parameter" in name):
        agree(model, expected)
    elif error is not None:
        assert name.split()[0] in str(error), error
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), left[0], strict=True))
    assert acc.pending == 0
    expected = stepped(model, optimizer, xy)
    for x, y in parts(xy):
        acc.backward(loss_of(model, x, y), items=len(x))
    agree(model, expected)
