"""What only a GPU can show: products into wider sums, a host that does not wait, and memory as its allocator counts it.

pytest --backend torch --device cuda
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch.torch as bb
from bigbatch.fused import torch_kernels
from conformance.torch_products import limits

WIDTH = 512


@pytest.fixture(autouse=True)
def whatever_its_size():
    with limits(cpu_elements=0, device_elements=0, device_work=0):
        yield


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(1024, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1024))


def tokens(n):
    return torch.randint(1024, (n, 8)), torch.randint(1024, (n, 8))


def language(model, autocast=False):
    def loss_fn(batch):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits = model(batch[0])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())

    return loss_fn


def window(door, model, loss_fn, batch, micro_batch, fused=True):
    """The gradients of one window, by a door."""
    if door == "split":
        bb.backward(loss_fn, batch, micro_batch=micro_batch, fused=fused)
        return [p.grad for p in model.parameters()]
    found = []

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            found.extend(p.grad for p in model.parameters())

    acc = bb.Accumulator(Look(model.parameters(), lr=1.0), every=len(batch[0]) // micro_batch, fused=fused)
    for part in zip(*(t.split(micro_batch) for t in batch), strict=True):
        acc.backward(loss_fn(part), items=len(part[0]))
    return found


class Calls(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("door", ["split", "stream"])
@pytest.mark.parametrize("narrow", ["weights", "autocast"])
def test_factors_of_16_bits_are_multiplied_into_float32_sums(door, narrow):
    """In one kernel, and nearer to the truth than products that are rounded first."""
    model, batch = network(), tokens(64)
    exact = copy.deepcopy(model).double()
    if narrow == "weights":
        model = model.bfloat16()
        exact.load_state_dict(model.state_dict())
    bb.backward(language(exact), batch, micro_batch=4)
    wanted = [p.grad for p in exact.parameters()]

    def error(fused):
        trained = copy.deepcopy(model)
        with Calls() as calls:
            found = window(door, trained, language(trained, narrow == "autocast"), batch, 4, fused)
        wide = [name for name in calls.names if name.startswith("aten.addmm.dtype_out")]
        return [((f - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)], len(wide)

    (fused, calls), (plain, none) = error(True), error(False)
    assert (calls, none) == (2 * 15, 0) if torch_kernels.HAS_WIDE_PRODUCTS else (0, 0)
    assert all(f < 1.05 * p for f, p in zip(fused, plain, strict=True)), (fused, plain)
    assert max(fused) < 0.02


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_host_never_waits_inside_a_window(narrow, fused):
    """Not even for items that the device counts."""
    model = network().to(torch.bfloat16 if narrow else torch.float32)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.1), every=4, fused=fused)
    x, y = tokens(16)
    for _ in range(2):
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.set_sync_debug_mode("error")  # a prototype, as it says the first time
        try:
            for i in range(3):
                labels = y[4 * i : 4 * i + 4]
                loss = language(model)((x[4 * i : 4 * i + 4], labels))
                assert acc.backward(loss, items=(labels != 3).sum()) is None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert acc.backward(language(model)((x[12:], y[12:])), items=32).skipped is None


@pytest.mark.parametrize("door", ["split", "stream"])
@pytest.mark.parametrize("narrow", [False, True])
def test_the_peak_is_flat_and_no_more_than_the_hand_written_loops(door, narrow):
    model = network().to(torch.bfloat16 if narrow else torch.float32)

    def peak(work):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    def ours(n):
        batch = tokens(n)
        return peak(lambda: window(door, model, language(model), batch, 1))

    def by_hand(n):
        parts = list(zip(*(t.split(1) for t in tokens(n)), strict=True))

        def work():
            for part in parts:
                (language(model)(part) / n).backward()

        return peak(work)

    ours(2), by_hand(2)
    assert ours(256) <= 1.02 * ours(2)
    if not narrow:  # by hand the sums are of 16 bits
        assert ours(16) <= by_hand(16)


def test_the_planned_need_is_what_the_allocator_counts():
    model = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024))
    x = torch.randn(16384, 1024)

    def loss_fn(batch):
        return model(batch[0]).square().mean()

    bb.backward(loss_fn, (x[:64],), micro_batch=32)  # cuBLAS takes its workspace
    model.zero_grad()
    plan = bb.plan(loss_fn, (x,), memory="512MiB")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    bb.backward(loss_fn, (x,), micro_batch=plan.micro_batch)
    assert plan.micro_batch < 16384
    assert plan.needs == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.15)


def test_out_of_memory_costs_only_time(caplog):
    """A real one: the plan is told of memory that is not there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4096), nn.Dropout(0.5), nn.GELU(), nn.Linear(4096, 1024))
    x = torch.randn(32768, 1024)

    def loss_fn(batch):
        return model(batch[0]).square().mean()

    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (900 << 20)) / total)
    try:
        torch.manual_seed(1)
        bb.backward(loss_fn, (x,), micro_batch="auto")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in caplog.text
    size = int(caplog.text.rsplit("done again with ", 1)[1].split()[0].strip(".").replace(",", ""))
    assert size < 32768
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    bb.backward(loss_fn, (x,), micro_batch=size)
    assert all(torch.equal(p.grad, f) for p, f in zip(model.parameters(), found, strict=True))
