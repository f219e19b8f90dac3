"""micro_batch="auto": what it chooses and remembers, and that an out-of-memory costs time and nothing else."""

import functools
import importlib
import logging
import resource
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bigbatch.torch as bb
from bigbatch.host import Memory

planning = importlib.import_module("bigbatch.torch.plan")  # the package has its function under this name

EXAMPLE = Path(__file__).parents[2] / "examples/torch_auto.py"
LENGTH = 24


class Fault(TorchDispatchMode):
    """Runs out of memory at one operation, counted from when it is armed."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count, self.armed = at, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.armed:
            self.count += 1
            if self.count == self.at:
                raise torch.OutOfMemoryError("out of memory, as a test wants it")
        return func(*args, **(kwargs or {}))


class Training:
    """A model with dropout and BatchNorm, and two updates from the same seed."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 400), nn.BatchNorm1d(400), nn.GELU(), nn.Dropout(0.3), nn.Linear(400, 400), nn.Tanh(),
            nn.Linear(400, 1),
        ).to(dtype)  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.batch = torch.randn(LENGTH, 6, dtype=dtype), torch.randn(LENGTH, 1, dtype=dtype)
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.fault = None
        self.sizes = []

    def loss(self, batch):
        if self.fault is not None:
            self.fault.armed = True
        self.sizes.append(len(batch[0]))
        return F.mse_loss(self.model(batch[0]), batch[1])

    def run(self, micro_batch, fault=None, updates=2):
        """Trains from the start; what came out, bit by bit."""
        self.model.load_state_dict(self.start)
        self.optimizer.state.clear()
        self.optimizer.zero_grad()
        self.fault, self.sizes = fault, []
        torch.manual_seed(1)
        losses = []
        for _ in range(updates):
            if fault is not None and not fault.armed:
                with fault:
                    losses.append(bb.backward(self.loss, self.batch, micro_batch=micro_batch))
            else:
                losses.append(bb.backward(self.loss, self.batch, micro_batch=micro_batch))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return [*losses, *self.model.state_dict().values(), torch.get_rng_state()]

    def choice(self):
        (choice,) = planning._remembered[Training.loss.__code__].values()
        return choice


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def _forget():
    planning._remembered.clear()


@pytest.fixture
def training():
    """Planned for, with micro-batches of 8."""
    training = Training()
    training.run("auto", updates=1)
    training.choice().micro_batch = 8
    return training


def test_it_is_the_micro_batch_that_fits(monkeypatch, caplog):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 64), nn.GELU(), nn.Tanh(), nn.GELU(), nn.Linear(64, 1)), torch.randn(4096, 6)
    sizes = []

    def loss_fn(part):
        sizes.append(len(part))
        return model(part).square().mean()

    room = planning._dry_runs(loss_fn, x, 4096, torch.float32).needs(820)
    keep = 2 * sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(planning, "device_memory", lambda device: Memory(0, room + keep, "the test"))
    monkeypatch.setattr(planning, "reserve", lambda device: 0.0)
    loss = bb.backward(loss_fn, x, micro_batch="auto")
    assert sizes[-5:] == [820, 820, 820, 820, 816]
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    assert torch.equal(loss, bb.backward(loss_fn, x, micro_batch=820))
    assert same(found, [p.grad for p in model.parameters()])
    (record,) = caplog.records
    assert record.name == "bigbatch.torch"
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert said.startswith('micro_batch="auto": micro_batch 820 of a batch of 4,096 (5 micro-batches) needs ')
    assert "kept for the optimizer's state), predicted from fake tensors in " in said


def test_another_word_is_refused():
    with pytest.raises(TypeError, match="micro_batch must be an integer"):
        bb.backward(lambda batch: batch.sum(), torch.ones(3), micro_batch="automatic")


def test_it_plans_once_for_each_shape(caplog):
    model, x, y = nn.Linear(6, 1), torch.randn(LENGTH, 6), torch.randn(LENGTH, 1)
    for length in (24, 24, 12, 24, 12):
        batch = x[:length], y[:length]
        bb.backward(lambda part: F.mse_loss(model(part[0]), part[1]), batch, micro_batch="auto")  # anew each time
    assert len(caplog.records) == 2


def test_whatever_a_loss_names_it_is_remembered(caplog):
    model, x, scale, table = nn.Linear(6, 1), torch.randn(LENGTH, 6), torch.ones(2, 2), np.ones(3)
    for _ in range(3):

        def loss_fn(part, numbers=[1, 2]):  # noqa: B006
            return model(part).square().mean() * scale.sum() * float(table[0]) * len(numbers)

        bb.backward(functools.partial(loss_fn, numbers=[3]), x, micro_batch="auto")
    assert len(caplog.records) == 1


def test_it_plans_again_for_another_model_and_for_thawed_parameters(caplog):
    models = [nn.Linear(6, 1), nn.Linear(6, 1)]
    batch = torch.randn(LENGTH, 6), torch.randn(LENGTH, 1)
    plans = []
    for change in ("none", "freeze", "none", "eval"):
        for model in models:
            if change == "freeze":
                model.bias.requires_grad_(False)
            model.train(change != "eval")
            bb.backward(lambda part, model=model: F.mse_loss(model(part[0]), part[1]), batch, micro_batch="auto")
            bb.backward(lambda part: F.mse_loss(model(part[0]), part[1]), batch, micro_batch="auto")  # noqa: B023
        plans.append(len(caplog.records))
    assert plans[0] >= 3
    assert plans[1] > plans[0]
    assert plans[2] == plans[1]
    assert plans[3] > plans[2]


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 5), (torch.bfloat16, 17)])
def test_out_of_memory_at_any_operation_costs_only_time(dtype, step):
    """In each micro-batch's forward and backward; then it is the uninterrupted run with half of 8, bit for bit."""
    training = Training(dtype)
    expected = training.run(4)
    assert not same(expected, training.run(8)), "or the test could not fail"
    training.run("auto")
    training.choice().micro_batch = 8
    never = Fault()
    training.run("auto", never)
    assert never.count > 3 * 40
    for at in range(1, never.count + 1, step):
        training.choice().micro_batch = 8
        assert same(expected, training.run("auto", Fault(at))), f"operation {at} of {never.count}"
        assert training.sizes[-12:] == [4] * 12, "and it stays with what fits"


def test_with_sums_that_do_not_round_the_size_does_not_matter():
    """Dyadic numbers, nothing drawn, nothing normalized over the batch: the uninterrupted run, whatever the size."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -0.5, 0.25, 2.0]]))
    x = torch.arange(64).reshape(16, 4).remainder(7).float()
    fault = Fault()

    def loss_fn(part):
        fault.armed = True
        return (model(part) - 1).square().mean()

    gradients = []
    for micro_batch, at in ((16, None), ("auto", None), ("auto", 20)):
        fault = Fault(at)
        model.weight.grad = None
        with fault:
            bb.backward(loss_fn, x, micro_batch=micro_batch)
        gradients.append(model.weight.grad)
        for choice in planning._remembered.get(loss_fn.__code__, {}).values():
            choice.micro_batch = 8
    assert fault.count > 20
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_gradients_from_before_are_kept(training):
    for p in training.model.parameters():
        p.grad = torch.ones_like(p)
    fault = training.fault = Fault(100)
    torch.manual_seed(2)
    training.model.load_state_dict(training.start)
    with fault:
        bb.backward(training.loss, training.batch, micro_batch="auto")
    found = [p.grad.clone() for p in training.model.parameters()]
    for p in training.model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(2)
    training.model.load_state_dict(training.start)
    bb.backward(training.loss, training.batch, micro_batch=4)
    assert same(found, [p.grad for p in training.model.parameters()])


def test_what_failed_is_freed_before_the_window_is_done_again(training):
    held, alive = [], []

    def hook(module, args, output):
        alive.append([ref() is not None for ref in held])
        held.append(weakref.ref(output))
        if len(held) == 2:
            raise torch.OutOfMemoryError

    handle = training.model[0].register_forward_hook(hook)
    bb.backward(training.loss, training.batch, micro_batch="auto")
    handle.remove()
    assert len(alive) > 2
    assert alive[2] == [False, False]


def test_memory_that_the_cpu_has_not(training, caplog):
    """The CPU's allocator has no exception type of its own."""

    def hook(module, args, output):
        if len(output) > 2:
            torch.empty(1 << 60, dtype=torch.uint8)

    handle = training.model[0].register_forward_hook(hook)
    bb.backward(training.loss, training.batch, micro_batch="auto")
    handle.remove()
    assert training.sizes[-12:] == [2] * 12
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        'micro_batch="auto": out of memory at 8; the window is run again with 4.',
        'micro_batch="auto": out of memory at 4; the window is run again with 2.',
    ]


def test_one_example_that_does_not_fit(training):
    def hook(module, args, output):
        raise torch.OutOfMemoryError("no")

    handle = training.model[6].register_forward_hook(hook)
    training.model[1].eval()  # it refuses a batch of one
    with pytest.raises(torch.OutOfMemoryError) as caught:
        bb.backward(training.loss, training.batch, micro_batch="auto")
    handle.remove()
    (note,) = caught.value.__notes__
    assert note.startswith('micro_batch="auto": not even one example at a time fits. Planned was: micro_batch 24 of')
    assert all(p.grad is None for p in training.model.parameters())


def test_other_errors_are_not_caught(training):
    training.sizes = []

    def hook(module, args, output):
        raise RuntimeError("a mistake")

    handle = training.model[6].register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="a mistake"):
        bb.backward(training.loss, training.batch, micro_batch="auto")
    handle.remove()
    assert training.sizes == [8]


def test_no_memory_for_one_example(monkeypatch):
    training = Training()
    monkeypatch.setattr(planning, "device_memory", lambda device: Memory(0, 1000, "the test"))
    with pytest.raises(MemoryError, match=r"No micro-batch fits in memory\. A micro-batch of 24 needs .* may be taken"):
        bb.backward(training.loss, training.batch, micro_batch="auto")


def limited(*arguments):
    """The example in a process that may use 2 GiB of addresses."""
    return subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLE.parents[1] / "src")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )


def test_a_machine_of_two_gib():
    plain = limited("--micro-batch", "4096", "--updates", "1")
    assert plain.returncode != 0
    assert "can't allocate memory" in plain.stderr
    done = limited("--micro-batch", "auto", "--updates", "2")
    assert done.returncode == 0, done.stderr
    assert 'micro_batch="auto": micro_batch ' in done.stderr
    assert "out of memory" not in done.stderr
    assert "update 2 of 2" in done.stdout
