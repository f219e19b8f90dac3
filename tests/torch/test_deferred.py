"""Deferred products: how many rows, when they are computed, and that none is lost or reaches another window."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb
from bigbatch.engines.torch_memory import PeakMemory
from bigbatch.fused.torch_deferred import capacity_for
from bigbatch.fused.torch_limits import LIMITS
from conformance.torch_products import limits, takes_products

from .products import agree, called, gradients, prove

pytestmark = pytest.mark.usefixtures("whatever_its_size")


@takes_products
def test_products_are_deferred_until_they_are_many_and_the_first_of_them_is_the_sum():
    model = nn.Linear(8, 8, bias=False)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=6)
    prove(acc, model)
    # Two rows each, and space for four: the third micro-batch has to flush them, and so has the fifth.
    assert [called(acc, model) for _ in range(5)] == [[], [], ["mm"], [], ["addmm_"]]
    assert called(acc, model) == ["addmm_"]  # the end


@takes_products
def test_products_of_many_rows_are_not_deferred():
    model = nn.Linear(8, 8, bias=False)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=4)
    prove(acc, model)
    assert [called(acc, model, rows=3) for _ in range(3)] == [["mm"], ["addmm_"], ["addmm_"]]


@takes_products
@pytest.mark.parametrize(("width", "deferred"), [(31, False), (32, True)])
def test_products_are_deferred_where_their_rows_are_an_eighth_of_the_weight(width, deferred):
    model = nn.Linear(width, width, bias=False)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=4)
    with limits(smaller=LIMITS.smaller):
        acc.backward(model(torch.randn(2, width)).square().mean(), items=2)
    assert (model.weight.grad is None) == deferred


def test_what_is_deferred_takes_less_than_the_largest_weight():
    weights = [torch.empty(1024, 784), torch.empty(1024, 1024)]
    with limits(**LIMITS._asdict()):
        assert capacity_for(weights) == 7 * 1024 * 1024 // (8 * (1024 + 784 + 2 * 1024)) == 237
        assert capacity_for(weights[:1]) == 256, "more gain nothing"
        assert capacity_for([]) == 0


@takes_products
def test_a_flushed_window_of_one_is_the_plain_step_to_the_bit():
    results = []
    for flushed in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        acc = bb.Accumulator(optimizer, every=8)  # a share that is exact
        loss = model(torch.randn(1, 8)).square().mean()
        if flushed:
            acc.backward(loss, items=1)
            assert model[0].weight.grad is None, "it is deferred"
            acc.flush()
        else:
            loss.backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@takes_products
def test_rows_looked_up_go_into_a_sum_whose_products_are_deferred():
    """A table at both ends: the head's rows come first, and are deferred."""
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(30, 30))
    start, parts = table.detach().clone(), torch.randint(0, 30, (3, 1))

    def loss(ids):
        return F.linear(F.embedding(ids, table), table).square().mean()

    sum(loss(ids) for ids in parts).backward()
    wanted, table.grad = table.grad, None
    acc = bb.Accumulator(torch.optim.SGD([table], lr=1.0), every=9)
    for ids in parts:
        acc.backward(loss(ids), items=1)
    assert (table.grad == 0).all(dim=1).sum() >= 27, "only what was looked up is in it"
    acc.flush()
    torch.testing.assert_close(start - table, wanted / 3)


@pytest.mark.parametrize("stop", range(1, 6))
def test_saved_while_products_are_deferred_it_goes_on_to_the_bit(stop):
    def run(resumed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8))
        acc = bb.Accumulator(torch.optim.Adam(model.parameters()), every=7)
        for i, part in enumerate(torch.randn(14, 2, 8)):
            if resumed and i == stop:
                file = io.BytesIO()
                torch.save(acc.state_dict(), file)
                file.seek(0)
                acc.reset()
                acc = bb.Accumulator(acc.optimizer, every=7)
                acc.load_state_dict(torch.load(file, weights_only=True))
            acc.backward(model(part).square().mean(), items=2)
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("broken", ["error", "nan", "reset", "drop"])
def test_deferred_products_never_reach_the_next_window(broken):
    def window(acc, model, parts):
        return [acc.backward(model(part).square().mean(), items=2) for part in parts][-1]

    results = []
    for trouble in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=3, partial="drop")
        parts = torch.randn(6, 2, 8)
        if trouble and broken == "nan":
            assert window(acc, model, [parts[0], parts[1] * torch.nan, parts[2]]).skipped
        elif trouble:
            window(acc, model, parts[:2])
            if broken == "error":
                loss = model(parts[0]).square().mean()
                torch.autograd.grad(loss, model.weight)
                with pytest.raises(RuntimeError, match="a second time"):
                    acc.backward(loss, items=2)
            elif broken == "reset":
                acc.reset()
            else:
                assert "dropped" in acc.flush().skipped
        window(acc, model, parts[3:])
        results.append(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_inputs_may_be_written_over_while_their_products_are_deferred():
    """A loader may fill one buffer again and again."""
    model, found = nn.Linear(8, 8).double(), []
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    for reused in (False, True):
        acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=10)
        buffer = torch.empty(2, 8, dtype=torch.float64)
        for part in x:
            acc.backward(model(buffer.copy_(part) if reused else part).square().mean(), items=2)
        acc._gradients._window.gradients([])
        found.append(gradients(model))
        acc.reset()
    agree(found[1], found[0], torch.float64)


@takes_products
@pytest.mark.parametrize("door", ["split", "stream"])
def test_the_peak_does_not_grow_with_the_window_and_is_below_the_hand_written_loops(door):
    torch.manual_seed(0)
    model = nn.Linear(128, 128, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def peak(n, door):
        x = torch.randn(n, 2, 128)
        with PeakMemory() as memory:
            if door == "split":
                bb.backward(lambda b: model(b[0]).square().mean(), (x,), micro_batch=1)
                optimizer.step()
                optimizer.zero_grad()
            elif door == "stream":
                acc = bb.Accumulator(optimizer, every=n)
                for part in x.split(1):
                    acc.backward(model(part).square().mean(), items=1)
            else:
                for part in x.split(1):
                    (model(part).square().mean() / n).backward()
                optimizer.step()
                optimizer.zero_grad()
        return memory.peak

    with limits(rows=LIMITS.rows, capacity=None):
        assert peak(1024, door) <= 1.02 * peak(2, door)
        assert peak(16, door) < peak(16, "hand-written")
    with limits(rows=LIMITS.rows, capacity=4):
        assert peak(16, door) < 0.7 * peak(16, "hand-written"), "but for what is deferred there is one sum"
