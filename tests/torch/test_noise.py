"""The noise scale through PyTorch's stream: the right numbers, no trace in the update, no wait, and self-closing."""

import gc
import io
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb
from bigbatch.fused import torch_graph
from bigbatch.fused.torch_proof import Proof
from bigbatch.noise import Noise, NoiseScale
from bigbatch.torch.window import numbers
from conformance.adapters.torch import Waits
from conformance.torch_products import small_ones_too, takes_products
from documentation import run_blocks

ROOT = Path(__file__).parents[2]


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def parts(sizes, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    return [(torch.randn(n, 4).to(dtype), torch.randn(n, 1).to(dtype)) for n in sizes]


def loss_of(model, part):
    return F.mse_loss(model(part[0]), part[1])


def by_hand(model, batches, items=None, loss_of=loss_of):
    """The estimate from every micro-batch's own gradient."""
    items = [len(part[0]) for part in batches] if items is None else items
    gradients = []
    for part in batches:
        found = torch.autograd.grad(loss_of(model, part), list(model.parameters()))
        gradients.append(torch.cat([g.to_dense().flatten().double() for g in found]))
    held = [(g, n) for g, n in zip(gradients, items, strict=True) if n]
    total = sum(n for _, n in held)
    mean = sum(n * g for g, n in held) / total
    return Noise.of(len(held), total, sum(n * float(g @ g) for g, n in held), float(mean @ mean))


def feed(acc, model, batches, items=None):
    items = [len(part[0]) for part in batches] if items is None else items
    return [acc.backward(loss_of(model, p), items=n) for p, n in zip(batches, items, strict=True)]


def close(noise, wanted, relative=1e-9):
    assert (noise.micro_batches, noise.items) == (wanted.micro_batches, wanted.items)
    assert noise.trace == pytest.approx(wanted.trace, rel=relative)
    assert noise.squared_norm == pytest.approx(wanted.squared_norm, rel=relative)


SIZES = [3, 1, 4, 2]


def test_a_window_says_what_every_gradient_by_itself_would():
    model = network()
    wanted = by_hand(model, parts(SIZES))
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, clip_norm=1e-3, noise=True)
    *inside, update = feed(acc, model, parts(SIZES))
    assert inside == [None] * 3
    close(update.noise, wanted)
    assert acc.noise_scale.windows == 1
    assert acc.noise_scale.scale == pytest.approx(max(wanted.trace, 0) / wanted.squared_norm)


def test_in_wide_sums_too():
    model = network(torch.bfloat16)
    wanted = by_hand(model, parts(SIZES, torch.bfloat16))
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, noise=True)
    close(feed(acc, model, parts(SIZES, torch.bfloat16))[-1].noise, wanted, 1e-3)


def test_under_a_scaler():
    model = network(torch.float32)
    wanted = by_hand(model, parts(SIZES, torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, scaler=scaler, noise=True)
    close(feed(acc, model, parts(SIZES, torch.float32))[-1].noise, wanted, 1e-4)


def test_items_on_the_device_and_a_micro_batch_without_any():
    model = network()
    items = [3, 0, 4, 2]
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, noise=True)
    losses = [loss_of(model, part) for part in parts(SIZES)]
    wanted = by_hand(model, parts(SIZES), items)
    for loss, n in zip(losses, items, strict=True):
        update = acc.backward(loss * (n > 0), items=torch.tensor(n))
    close(update.noise, wanted)


def test_sparse_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(6, 4, sparse=True, dtype=torch.float64)

        def forward(self, ids):
            return self.table(ids).sum(1) + self.table(ids[:, :1])[:, 0]

    def loss_of(model, part):
        return model(part[0]).tanh().square().mean()

    model = Tied()
    torch.manual_seed(2)
    batches = [(torch.randint(6, (n, 3)),) for n in SIZES]
    wanted = by_hand(model, batches, loss_of=loss_of)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, noise=True)
    for part in batches:
        update = acc.backward(loss_of(model, part), items=len(part[0]))
    close(update.noise, wanted)


@takes_products
def test_beside_fused_weight_gradients():
    """A measured window is left to autograd, so that every gradient is seen; the next one is fused again."""
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=4, noise=2)
    updates, taken = [], []
    with small_ones_too():
        for part in parts(SIZES) * 3:
            loss = loss_of(model, part)
            taken.append(torch_graph.read(loss, Proof()).has_products)
            updates.append(acc.backward(loss, items=len(part[0])))
    assert taken == [False] * 4 + [True] * 4 + [False] * 4
    measured = [u for u in updates if u is not None and u.noise is not None]
    assert [u.index for u in measured] == [0, 2]
    close(measured[1].noise, by_hand(model, parts(SIZES)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_update_is_the_same_to_the_bit(dtype):
    results = []
    for noise in (False, True):
        model = network(dtype)
        acc = bb.Accumulator(torch.optim.AdamW(model.parameters(), lr=0.1), every=4, clip_norm=0.1, noise=noise)
        feed(acc, model, parts(SIZES * 3, dtype))
        results.append(list(model.parameters()))
    assert all(map(torch.equal, *results))


def test_no_wait_inside_a_window():
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, noise=1)
    feed(acc, model, parts(SIZES))
    with Waits() as waits:
        feed(acc, model, parts(SIZES[:2]))
        acc.backward(loss_of(model, parts([4])[0]), items=torch.tensor(4))
    assert waits.count == 0


def hooks(model):
    return [len(p._backward_hooks or ()) for p in model.parameters()]


def test_one_window_in_twenty_and_no_hooks_in_the_others():
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=2, noise=True)
    updates = []
    for _ in range(21):
        updates += [u for u in feed(acc, model, parts([2, 3])) if u]
        assert hooks(model) == ([1] * 4 if len(updates) % 20 == 0 else [0] * 4)
    assert [u.index for u in updates if u.noise] == [0, 20]
    assert acc.noise_scale.windows == 2


def test_the_hooks_go_with_the_accumulator():
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=2, noise=1)
    assert hooks(model) == [1] * 4
    del acc
    gc.collect()
    assert hooks(model) == [0] * 4


def test_backwards_of_others_are_not_counted():
    model = network()
    wanted = by_hand(model, parts(SIZES))
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=4, noise=True)
    for part in parts(SIZES):
        torch.autograd.grad(loss_of(model, parts([5], seed=9)[0]), list(model.parameters()))
        update = acc.backward(loss_of(model, part), items=len(part[0]))
    close(update.noise, wanted)


@pytest.mark.parametrize("every", [4, bb.until_noise(eta=1e-3, at_most=4)], ids=str)
def test_saved_and_restored_inside_a_window(every):
    def start():
        model = network()
        return model, bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=every, noise=1)

    model, acc = start()
    wanted = [u for u in feed(acc, model, parts(SIZES * 2)) if u]
    model, acc = start()
    feed(acc, model, parts(SIZES * 2)[:6])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "acc": acc.state_dict()}, file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    model, acc = start()
    model.load_state_dict(state["model"])
    acc.load_state_dict(state["acc"])
    assert feed(acc, model, parts(SIZES * 2)[6:])[-1] == wanted[-1]
    assert acc.noise_scale.windows == 2


def test_a_state_from_before_noise_was_measured():
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4)
    feed(acc, model, parts(SIZES[:2]))
    state = acc.state_dict()
    for old in (state, {k: v for k, v in state.items() if k != "noise"}):
        measuring = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, noise=1)
        measuring.load_state_dict(old)
        first = feed(measuring, model, parts(SIZES[2:]))[-1]
        assert first.noise is None  # its first half was not seen
        assert feed(measuring, model, parts(SIZES))[-1].noise is not None


# What cannot be told.


def test_windows_of_one_micro_batch():
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=1, noise=1)
    update = feed(acc, model, parts([4]))[0]
    assert update.noise.micro_batches == 1
    assert math.isnan(update.noise.trace)
    assert "no window held two micro-batches or more" in str(acc.noise_scale)


@pytest.mark.parametrize("every", [4, bb.until_noise(at_most=4)], ids=str)
def test_a_window_of_nan_is_skipped_and_not_counted(every):
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=every, noise=1)
    bad = parts(SIZES)
    bad[0][0].fill_(math.nan)
    updates = [u for u in feed(acc, model, bad) if u]
    assert [u.micro_batches for u in updates] == [4]
    assert updates[0].skipped.startswith("the window is not finite")
    assert acc.noise_scale.windows == 0
    feed(acc, model, parts(SIZES * 2))
    assert acc.noise_scale.windows >= 1
    assert math.isfinite(acc.noise_scale.trace)


@pytest.mark.parametrize("every", [4, bb.until_noise(at_most=4)], ids=str)
def test_zero_gradients(every):
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=every, noise=1)
    for part in parts(SIZES):
        acc.backward(loss_of(model, part) * 0, items=len(part[0]))
    assert str(acc.noise_scale).startswith("none: the gradient is zero")


def test_an_error_inside_a_window_leaves_no_trace():
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=4, noise=1)
    feed(acc, model, parts(SIZES[:2], seed=5))

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        acc.backward(loss_of(model, (Fails.apply(parts([2])[0][0].requires_grad_()), parts([2])[0][1])), items=2)
    close(feed(acc, model, parts(SIZES))[-1].noise, by_hand(model, parts(SIZES)))


def test_noise_is_checked_at_the_door():
    model = network()
    with pytest.raises(ValueError, match=r"noise must be True, False or an integer of at least 1\. Received: noise=0"):
        bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, noise=0)


# Windows that close themselves.


def signal(size, strength, noise, count, d=300):
    """Gradients of a linear model, g = strength·e + noise·N(0, 1/d) an item, so that the noise scale is known."""
    torch.manual_seed(0)
    direction = torch.full((d,), d**-0.5, dtype=torch.float64)
    return [strength * direction + noise * torch.randn(size, d, dtype=torch.float64) * d**-0.5 for _ in range(count)]


def closing(xs, **options):
    w = nn.Parameter(torch.zeros(300, dtype=torch.float64))
    acc = bb.Accumulator(torch.optim.SGD([w], lr=0.0), every=bb.until_noise(**options))
    return acc, [u for x in xs if (u := acc.backward((x @ w).mean(), items=len(x)))]


def test_without_noise_a_window_holds_two():
    _, updates = closing(signal(2, 1.0, 1e-6, 8), at_most=64)
    assert [u.micro_batches for u in updates] == [2] * 4


def test_noise_alone_fills_the_window():
    _, updates = closing(signal(2, 0.0, 1.0, 40), eta=0.2, at_most=20)
    assert [u.micro_batches for u in updates] == [20] * 2


def test_a_window_holds_about_the_noise_scale_over_eta_squared():
    acc, updates = closing(signal(2, 1.0, 10.0, 3000), at_most=512)
    sizes = torch.tensor([u.items for u in updates])
    assert 60 < sizes.mean() < 120  # of 100
    assert all(u.noise.trace <= u.noise.squared_norm * u.items for u in updates)
    assert all(u.micro_batches in acc.every.looks for u in updates)


def test_the_host_waits_only_to_look():
    w = nn.Parameter(torch.zeros(300, dtype=torch.float64))
    acc = bb.Accumulator(torch.optim.SGD([w], lr=0.0), every=bb.until_noise(eta=0.01, at_most=64))
    waited = []
    for x in signal(2, 1.0, 10.0, 30):
        with mock.patch("bigbatch.torch.noise.numbers", wraps=numbers) as read:
            acc.backward((x @ w).mean(), items=len(x))
        waited.append(read.called)
    assert [n for n, wait in enumerate(waited, 1) if wait] == [n for n in acc.every.looks if n <= 30]


# Monte Carlo, through the whole path.


@pytest.mark.parametrize("sizes", [[4] * 8, [1, 2, 3, 10, 4, 4, 6, 2]], ids=["equal", "ragged"])
def test_monte_carlo(sizes):
    d, windows = 200, 1500
    scales = torch.linspace(0.5, 1.5, d, dtype=torch.float64)
    gradient = torch.full((d,), math.sqrt(10 / d), dtype=torch.float64)
    trace, squared_norm = scales.square().sum().item(), 10.0
    w = nn.Parameter(torch.zeros(d, dtype=torch.float64))
    acc = bb.Accumulator(torch.optim.SGD([w], lr=0.0), every=len(sizes), noise=1)
    draws = torch.Generator().manual_seed(0)
    found = []
    for _ in range(windows):
        for n in sizes:
            x = gradient + scales * torch.randn(n, d, dtype=torch.float64, generator=draws)
            update = acc.backward((x @ w).mean(), items=n)
        found.append((update.noise.trace, update.noise.squared_norm))
    means = torch.tensor(found).mean(0)
    assert abs(means[0] / trace - 1) < 0.01
    assert abs(means[1] / squared_norm - 1) < 0.01
    low, high = acc.noise_scale.interval
    assert low < trace / squared_norm < high


def test_the_running_scale_can_look_back_further():
    model = network()
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=2, noise=1)
    updates = [u for u in feed(acc, model, parts([2, 3] * 10)) if u]
    longer = NoiseScale(decay=0.999)
    for update in updates:
        longer.add(update.noise)
    assert longer.windows == acc.noise_scale.windows == 10
    assert [row["update"] for row in bb.noise_curve(updates)] == list(range(10))


def test_the_page_runs():
    assert run_blocks(ROOT / "docs/noise.md") == 3
