"""`audit` on a zoo whose truth is known, and what it leaves as it was."""

import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb
from documentation import run_blocks

from .zoo import MICRO_BATCH, ZOO, classified, examples

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("specimen", ZOO, ids=lambda specimen: specimen.name)
def test_the_zoo(specimen):
    torch.manual_seed(0)
    loss_fn, model, batch = specimen.make()
    found = bb.audit(loss_fn, model, batch, micro_batch=MICRO_BATCH)
    assert found.exact == specimen.exact, found
    assert {cause.kind: cause.where for cause in found.causes} == specimen.causes, found
    assert found.dtype == "float64"


def test_the_gradient_that_an_audit_calls_exact_is_the_one_that_split_gives():
    """The audit's own sums are those of the split door."""
    loss_fn, model, batch = next(s for s in ZOO if s.name == "token_mean_with_items").make()
    model.double()
    loss_fn(batch)[0].backward()
    full = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    bb.backward(loss_fn, batch, micro_batch=MICRO_BATCH)
    assert all(torch.allclose(p.grad, g, rtol=1e-12) for p, g in zip(model.parameters(), full, strict=True))


# What it leaves as it was.


def everything(model, optimizer):
    """All that an audit could leave a trace in."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: (id(t), t.data_ptr(), t.dtype, t.detach().clone()) for name, t in tensors.items()}
    grads = {name: None if p.grad is None else (id(p.grad), p.grad.clone()) for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    chance = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    return state, grads, modes, attributes, optimizer.state_dict(), chance


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Everything(nn.Module):
    """BatchNorm, dropout, and a forward that leaves notes on itself."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 4))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + len(x)
        self.note = x.mean() + random.random() + np.random.rand()
        return self.net(x)


@pytest.mark.parametrize("error", [False, True], ids=["returns", "raises"])
def test_it_leaves_everything_as_it_was(error):
    torch.manual_seed(0)
    model = Everything()
    model.net[4].eval()
    optimizer = torch.optim.AdamW(model.parameters())
    x, y = examples()
    acc = bb.Accumulator(optimizer, every=2)
    for _ in range(3):  # one update made, and one micro-batch in the open window
        acc.backward(F.cross_entropy(model(x), y), items=len(x))
    before = everything(model, optimizer)
    calls = []

    def loss_fn(batch):
        calls.append(len(batch[0]))
        if error and len(calls) == 12:
            raise RuntimeError("mine")
        return F.cross_entropy(model(batch[0]), batch[1])

    if error:
        with pytest.raises(RuntimeError, match="mine"):
            bb.audit(loss_fn, model, (x, y), micro_batch=4)
    else:
        assert not bb.audit(loss_fn, model, (x, y), micro_batch=4).exact
    assert equal(everything(model, optimizer), before)
    assert acc.backward(F.cross_entropy(model(x), y), items=len(x)).micro_batches == 2


def test_hooks_on_parameters_do_not_fire():
    model = nn.Linear(6, 4)
    fired = []
    model.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p))
    handle = model.weight.register_hook(lambda g: fired.append(g) or g.clamp(-1e-3, 1e-3))
    assert bb.audit(classified(model), model, examples(), micro_batch=4).exact
    assert not fired
    model(examples()[0]).sum().backward()  # they are there again
    assert len(fired) == 2
    handle.remove()
    model(examples()[0]).sum().backward()
    assert len(fired) == 3


def test_it_runs_under_no_grad():
    model = nn.Linear(6, 4)
    with torch.no_grad():
        assert bb.audit(classified(model), model, examples(), micro_batch=4).exact


# What it works with.


def test_tensors_in_place_of_a_model():
    w, frozen = torch.randn(6, 4, requires_grad=True), torch.randn(4)
    found = bb.audit(lambda b: F.cross_entropy(b[0] @ w + frozen, b[1]), [w, frozen], examples(), micro_batch=4)
    assert [p.name for p in found.parameters] == ["parameters[0]"]
    assert (found.exact, found.dtype) == (True, "float64")


class OnlyFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.layer(x.float()) @ torch.eye(4, dtype=torch.float32))


def test_a_model_that_cannot_compute_in_float64():
    model = OnlyFloat32()
    found = bb.audit(classified(model), model, examples(), micro_batch=4)
    assert (found.dtype, found.exact) == ("float32", False)
    assert [(c.kind, c.where) for c in found.causes] == [("module", ("norm",))]
    found = bb.audit(classified(model.eval()), model, examples(), micro_batch=4)
    assert (found.dtype, found.exact) == ("float32", True)
    assert found.error > 1e-9


def test_a_float64_model_with_parts_in_float32():
    """As language models normalize: what is rounding is seen, and is not taken for a fault."""

    class Norm(nn.Module):
        def forward(self, x):
            wide = x.float()
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Norm(), nn.Tanh(), nn.Linear(8, 4))
    found = bb.audit(classified(model), model, examples(), micro_batch=4)
    assert (found.dtype, found.exact) == ("float64", True)
    assert 1e-9 < found.error < found.tolerance < 1e-4
    assert "with parts narrower" in str(found)
    model[1] = nn.Sequential(Norm(), nn.BatchNorm1d(8))
    found = bb.audit(classified(model), model, examples(), micro_batch=4)
    assert [(c.kind, c.where) for c in found.causes] == [("module", ("1.1",))]
    model[1] = Norm()
    found = bb.audit(lambda b: F.cross_entropy(model(b[0]), b[1], reduction="sum"), model, examples(), micro_batch=4)
    assert [c.kind for c in found.causes] == ["sum"]


def test_a_bfloat16_model_is_audited_in_float64():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).bfloat16()
    x, y = examples()
    found = bb.audit(classified(model), model, (x.bfloat16(), y), micro_batch=4)
    assert (found.dtype, found.exact) == ("float64", True)
    assert model[0].weight.dtype == torch.bfloat16


def test_a_sparse_embedding():
    model = nn.Sequential(nn.Embedding(12, 6, sparse=True), nn.Flatten(), nn.Linear(36, 4))
    ids = torch.randint(12, (14, 6))
    assert bb.audit(classified(model), model, (ids, torch.randint(4, (14,))), micro_batch=4).exact


def test_a_sequence_first_recurrent_network():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.norm, self.head = nn.LSTM(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

        def forward(self, x):  # (n, t, 6)
            hidden = self.lstm(x.transpose(0, 1))[0].permute(1, 2, 0)
            return self.head(self.norm(hidden).mean(2))

    model = Tagger()
    found = bb.audit(classified(model), model, (torch.randn(14, 3, 6), torch.randint(4, (14,))), micro_batch=4)
    assert [(c.kind, c.where) for c in found.causes] == [("module", ("norm",))]
    found = bb.audit(classified(model.eval()), model, (torch.randn(14, 3, 6), torch.randint(4, (14,))), micro_batch=4)
    assert found.exact


def test_a_function_that_mixes_examples_is_blamed_on_the_module_it_stands_in():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            hidden = self.first(x)
            return self.last(hidden - hidden.mean(0) * self.first.bias.exp())

    model = nn.Sequential(Mixes())
    found = bb.audit(classified(model), model, examples(), micro_batch=4)
    assert [(c.kind, c.where) for c in found.causes] == [("module", ("0",))]


def test_two_causes_at_once():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
    found = bb.audit(
        lambda b: F.cross_entropy(model(b[0]), b[1], reduction="sum"), model, examples(), micro_batch=4
    )  # fmt: skip
    assert [(c.kind, c.where) for c in found.causes] == [("module", ("1",)), ("sum", ())]


def test_chance_that_cannot_be_put_to_rest_beside_a_wrong_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def loss_fn(batch):
        noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
        return F.cross_entropy(model(noisy), batch[1], reduction="sum")

    found = bb.audit(loss_fn, model, examples(), micro_batch=4)
    assert not found.exact
    assert [c.kind for c in found.causes] == ["stochastic", "unknown"]
    assert "differ by more than twice their standard error" in str(found)


def test_a_loss_that_is_not_deterministic_is_told_so():
    model, calls = nn.Linear(6, 4), []

    def loss_fn(batch):
        calls.append(0)
        return F.cross_entropy(model(batch[0]), batch[1]) * (1 + len(calls))

    found = bb.audit(loss_fn, model, examples(), micro_batch=4)
    assert not found.exact
    assert [c.kind for c in found.causes] == ["not deterministic"]
    own = torch.Generator().manual_seed(0)
    found = bb.audit(
        lambda b: F.cross_entropy(model(b[0] + torch.randn(b[0].shape, generator=own)), b[1]),
        model, examples(), micro_batch=4,
    )  # fmt: skip
    assert [c.kind for c in found.causes] == ["not deterministic"]


# What it says.


def test_it_reads_as_a_report():
    torch.manual_seed(0)
    loss_fn, model, batch = next(s for s in ZOO if s.name == "batch_norm_behind_the_first_layer").make()
    found = bb.audit(loss_fn, model, batch, micro_batch=4)
    lines = str(found).splitlines()
    assert lines[0] == found.verdict == "not exact: 5 of 6 parameters differ, the largest by 111%"
    assert lines[1].startswith("- module (1): An example's output of 1 depends on the other examples")
    assert lines[2].split() == ["parameter", "ratio", "of", "norms", "relative", "error", "angle"]
    assert lines[3].startswith(f"  {found.differing[0].name}")
    assert lines[-1] == "  (a batch of 14 in micro-batches of 4, float64, 6 parameters)"
    assert repr(found) == "<Audit: not exact: 5 of 6 parameters differ, the largest by 111%; module (1)>"
    assert [p.error for p in found.differing] == sorted((p.error for p in found.differing), reverse=True)
    assert 10 < found.differing[0].angle < 180


def test_an_exact_one_says_how_exact():
    loss_fn, model, batch = ZOO[0].make()
    assert bb.audit(loss_fn, model, batch, micro_batch=4).verdict.startswith("exact to ")
    loss_fn, model, batch = next(s for s in ZOO if s.name == "dropout").make()
    assert bb.audit(loss_fn, model, batch, micro_batch=4).verdict.endswith(", apart from randomness")


def test_tables_and_figures(tmp_path):
    from rich.console import Console

    loss_fn, model, batch = next(s for s in ZOO if s.name == "batch_norm_at_three_depths").make()
    found = bb.audit(loss_fn, model, batch, micro_batch=4)
    console = Console(record=True, width=100)
    console.print(found.table())
    text = console.export_text()
    assert all(p.name in text for p in found.differing)
    found.figure(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size > 10_000


# What it refuses.


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"micro_batch": 0}, ValueError, "micro_batch must be at least 1"),
        ({"micro_batch": 14}, ValueError, "An audit needs more than one micro-batch. Received: micro_batch=14"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module or tensors"),
        ({"model": nn.Linear(6, 4).requires_grad_(False)}, ValueError, "No parameter requires a gradient"),
        ({"batch": (torch.zeros(3, 6), torch.zeros(2))}, ValueError, "The leaves of a batch must have the same length"),
        ({"loss_fn": lambda b: b[0]}, ValueError, "The loss must be a scalar of a floating type"),
        ({"loss_fn": lambda b: (1, 2, 3)}, TypeError, "loss_fn must return the mean loss or"),
        ({"loss_fn": lambda b: (b[0].sum() + torch.zeros((), requires_grad=True), -1)}, ValueError, "items must be"),
    ],
)
def test_bad_input(change, kind, words):
    model = nn.Linear(6, 4)
    given = {"loss_fn": classified(model), "model": model, "batch": examples(), "micro_batch": 4, **change}
    with pytest.raises(kind, match=words):
        bb.audit(**given)


def test_the_page_runs():
    assert run_blocks(ROOT / "docs/audit.md") == 2


def test_the_example(capsys):
    runpy.run_path(str(ROOT / "examples/torch_honest.py"))
    said = capsys.readouterr().out
    assert "not exact: " in said
    assert "\nexact to " in said
    assert "noise scale: " in said
    assert "windows of [" in said
