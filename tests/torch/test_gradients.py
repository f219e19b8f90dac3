"""`bb.Gradients`: what the laws, which run on it too, do not look at."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn

import bigbatch.torch as bb

X = torch.randn(11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PARTS = X.split(4)  # 4, 4 and 3


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def loss_of(model, x):
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def full(model, x=X):
    """The batch's own gradient."""
    return torch.autograd.grad(loss_of(model, x), list(model.parameters()))


def agree(model, wanted, relative=1e-12):
    for p, w in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=relative, atol=relative)


def fill(grads, model, parts=PARTS, last=False):
    """One window; every report but the last is None."""
    reports = [
        grads.backward(loss_of(model, x), items=len(x), last=last and k == len(parts) - 1) for k, x in enumerate(parts)
    ]
    assert not any(reports[:-1])
    return reports[-1]


@pytest.mark.parametrize("every", [None, 3, 5, bb.items(11), lambda index: 3 + index])
def test_the_mean_lies_in_grad(every):
    model = net()
    grads = bb.Gradients(model.parameters(), every)
    for index in range(2):  # the second window discards the first one's mean
        report = fill(grads, model, last=True)
        wanted = full(model)
        agree(model, wanted)
        assert (report.index, report.micro_batches, report.items, report.skipped) == (index, 3, 11, None)
        assert report.loss == pytest.approx(loss_of(model, X).item(), rel=1e-12)
        norm = torch.nn.utils.get_total_norm(wanted).item()
        assert report.grad_norm == pytest.approx(norm, rel=1e-12)
        assert (grads.index, grads.pending) == (index + 1, 0)


def test_flush_closes_what_is_there_and_nothing_else():
    model = net()
    grads = bb.Gradients(model.parameters(), every=3)
    assert grads.flush() is None
    fill(grads, model, PARTS[:2])
    assert grads.flush().micro_batches == 2
    agree(model, full(model, X[:8]))
    assert grads.flush() is None
    agree(model, full(model, X[:8]))  # the caller's still


def test_a_window_of_one_is_autograds_to_the_bit():
    model = net(torch.float32)
    for every in (None, 1, 4):
        bb.Gradients(model.parameters(), every).backward(loss_of(model, X), items=11, last=True)
        wanted = full(model)
        assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))
        model.zero_grad()


@pytest.mark.parametrize("act", ["nothing", "zero_grad", "clip and step"])
def test_what_the_caller_does_with_the_mean_makes_no_warning_and_no_difference(act):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads = bb.Gradients(model.parameters(), every=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            fill(grads, model)
            agree(model, full(model))
            if act == "zero_grad":
                optimizer.zero_grad()
            elif act == "clip and step":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()


def test_gradients_of_others_are_discarded_with_a_warning():
    model = net()
    grads = bb.Gradients(model.parameters(), every=3)
    fill(grads, model)
    model.zero_grad()
    loss_of(model, X[:1]).backward()
    with pytest.warns(UserWarning, match="discarded"):
        fill(grads, model)
    agree(model, full(model))


@pytest.mark.parametrize("act", ["step", "zero_grad", "clip"])
def test_an_open_window_is_nobody_elses(act):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads = bb.Gradients(model.parameters(), every=3)
    fill(grads, model)
    before = [p.clone() for p in model.parameters()]
    fill(grads, model, PARTS[:2])
    with pytest.raises(RuntimeError, match="open window"):  # noqa: PT012 - some are seen at once, some at the next
        if act == "step":
            optimizer.step()
        elif act == "zero_grad":
            optimizer.zero_grad()
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        grads.backward(loss_of(model, PARTS[2]), items=3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    fill(grads, model)
    agree(model, full(model))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_mean_that_is_not_finite_is_left_for_the_callers_guard(bad):
    model = net()
    grads = bb.Gradients(model.parameters(), every=2)
    grads.backward(loss_of(model, X), items=11)
    report = grads.backward(loss_of(model, X) * bad, items=11)
    assert report.skipped is None
    assert not math.isfinite(report.loss)
    assert not math.isfinite(report.grad_norm)
    assert not all(p.grad.isfinite().all() for p in model.parameters())
    fill(grads, model, PARTS[:2])
    agree(model, full(model, X[:8]))


@pytest.mark.parametrize(("items", "said"), [(0.0, "no items"), (-1.0, "negative"), (math.nan, "NaN")])
def test_where_there_is_no_mean_the_caller_can_step_without_harm(items, said):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    grads = bb.Gradients(model.parameters(), every=1)
    report = grads.backward(loss_of(model, X), items=torch.tensor(items))
    assert said in report.skipped
    assert all(p.grad is None for p in model.parameters())
    before = [p.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    grads.backward(loss_of(model, X), items=11)
    agree(model, full(model))


def test_narrow_parameters_add_up_in_float32_and_are_rounded_once():
    model = net(torch.bfloat16)
    parts = [x.bfloat16() for x in X.repeat(40, 1).split(1)]
    grads = bb.Gradients(model.parameters())
    sums = [torch.zeros(p.shape) for p in model.parameters()]
    for k, x in enumerate(parts):
        for total, g in zip(sums, full(model, x), strict=True):
            total += g.float()
        grads.backward(loss_of(model, x), items=1, last=k == len(parts) - 1)
    for p, total in zip(model.parameters(), sums, strict=True):
        assert p.grad.dtype == torch.bfloat16
        torch.testing.assert_close(p.grad.float(), (total / len(parts)), rtol=2**-8, atol=1e-6)


def test_under_a_scaler_the_mean_is_scaled_once():
    """As a trainer has it: it unscales, clips, steps through the scaler, and updates that."""
    model = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1)
    grads = bb.Gradients(model.parameters(), scaler=scaler)
    for scale, bad in ((256, False), (512, True), (256, False)):
        wanted = full(model)
        before = [p.clone() for p in model.parameters()]
        parts = [x * math.inf if bad else x for x in PARTS]
        report = fill(grads, model, parts, last=True)
        if not bad:
            agree(model, [scale * w for w in wanted], 1e-5)
            assert report.grad_norm == pytest.approx(torch.nn.utils.get_total_norm(wanted).item(), rel=1e-5)
        scaler.unscale_(optimizer)
        if not bad:
            agree(model, wanted, 1e-5)
        scaler.step(optimizer)
        scaler.update()
        moved = not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved is not bad


def test_a_scaler_that_is_updated_inside_a_window_is_refused():
    model = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    grads = bb.Gradients(model.parameters(), scaler=scaler)
    fill(grads, model, PARTS[:2], last=True)
    scaler.unscale_(optimizer)
    scaler.update()  # between windows it may be
    grads.backward(loss_of(model, PARTS[0]), items=4)
    with pytest.raises(RuntimeError, match=r"scaler\.update"):  # noqa: PT012
        scaler.unscale_(optimizer)
        scaler.update()
        grads.backward(loss_of(model, PARTS[1]), items=4, last=True)
    assert grads.pending == 0


def test_a_state_goes_on_inside_a_window_bit_for_bit():
    model = net(torch.float32)
    grads = bb.Gradients(model.parameters())
    fill(grads, model, last=True)
    straight = [p.grad for p in model.parameters()]
    fill(grads, model, PARTS[:2])
    file = io.BytesIO()
    torch.save(grads.state_dict(), file)
    grads.reset()
    twin = copy.deepcopy(model)
    other = bb.Gradients(twin.parameters())
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.index, other.pending) == (1, 2)
    other.backward(loss_of(twin, PARTS[2]), items=3, last=True)
    assert all(torch.equal(p.grad, w) for p, w in zip(twin.parameters(), straight, strict=True))


def test_an_optimizer_may_grow_between_windows():
    model = net()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    model[0].requires_grad_(False)
    grads = bb.Gradients(optimizer, every=3)
    fill(grads, model)
    assert model[0].weight.grad is None
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    fill(grads, model)
    agree(model, full(model))


def test_several_optimizers_are_one_window():
    model = net()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (model[0], model[2])]
    fill(bb.Gradients(optimizers, every=3), model)
    agree(model, full(model))


def test_without_the_norm_the_mean_is_the_same():
    model = net()
    report = fill(bb.Gradients(model.parameters(), 3, norm=False), model)
    agree(model, full(model))
    assert math.isnan(report.grad_norm)
    assert report.skipped is None
    assert report.loss == pytest.approx(loss_of(model, X).item(), rel=1e-12)
    model.zero_grad()  # the noise needs it
    assert math.isfinite(fill(bb.Gradients(model.parameters(), 3, norm=False, noise=1), model).grad_norm)


def test_noise_is_measured():
    model = net()
    grads = bb.Gradients(model.parameters(), every=3, noise=1)
    report = fill(grads, model)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=3, noise=1)
    model.zero_grad()
    assert report.noise == fill_accumulator(acc, model).noise
    assert grads.noise_scale.windows == 1


def fill_accumulator(acc, model):
    return [acc.backward(loss_of(model, x), items=len(x)) for x in PARTS][-1]


REFUSED = {
    "a module": (lambda m: bb.Gradients(m), TypeError, "Pass model.parameters"),
    "one tensor": (lambda m: bb.Gradients(m[0].weight), TypeError, "must be tensors"),
    "no tensors": (lambda m: bb.Gradients([1.0]), TypeError, "must be tensors"),
    "names": (lambda m: bb.Gradients(m.named_parameters()), TypeError, "must be tensors"),
    "nothing": (lambda m: bb.Gradients(iter(())), ValueError, "There are no parameters"),
    "an inner node": (lambda m: bb.Gradients([m[0].weight * 2]), ValueError, "must be leaves"),
    "every=0": (lambda m: bb.Gradients(m.parameters(), 0), ValueError, "every must be at least 1"),
    "dtype": (lambda m: bb.Gradients(m.parameters(), dtype=torch.int32), ValueError, "dtype must be"),
    "scaler": (lambda m: bb.Gradients(m.parameters(), scaler=3), TypeError, "scaler must be"),
    "sync": (lambda m: bb.Gradients(m.parameters(), sync="window"), ValueError, "sync says"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_are_refused(name):
    make, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        make(net())


@pytest.mark.parametrize(("given", "kind"), [({"last": 1}, TypeError), ({"items": 0}, ValueError)])
def test_a_refused_micro_batch_leaves_the_window_as_it_was(given, kind):
    model = net()
    grads = bb.Gradients(model.parameters())
    fill(grads, model, PARTS[:2])
    with pytest.raises(kind):
        grads.backward(loss_of(model, PARTS[2]), **{"items": 3, **given})
    assert grads.pending == 2
    grads.backward(loss_of(model, PARTS[2]), items=3, last=True)
    agree(model, full(model))


def test_its_representation_says_where_it_stands():
    grads = bb.Gradients(net().parameters(), every=3)
    assert repr(grads) == "Gradients(4 parameters, every=3: 0 left, 0 micro-batches pending)"
