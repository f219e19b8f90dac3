"""Weight gradients straight into the sums: the same gradients as autograd's, and autograd's where it must be."""

import copy
import logging
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bigbatch.torch as bb
from bigbatch.engines.torch_memory import PeakMemory
from bigbatch.torch import fused
from bigbatch.torch.fused import Fused


@pytest.fixture(autouse=True)
def whatever_its_size(monkeypatch):
    monkeypatch.setattr(fused, "SMALLEST", 0)


class Calls(TorchDispatchMode):
    """Counts the operations that reach the device, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Tied(nn.Module):
    """A language model in small: one table for both ends, and a layer used twice."""

    def __init__(self, bias=True, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=padding_idx)
        self.middle = nn.Linear(6, 6, bias=bias)
        self.out = nn.Linear(6, 11, bias=bias)
        self.out.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.out(torch.tanh(self.middle(torch.tanh(self.middle(x)))))


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def by(door, model, loss_fn, batch, micro_batch, **options):
    """The window's gradient through one of the doors; `fused` says which way."""
    on = options.pop("on")
    if door == "split":
        bb.backward(loss_fn, batch, micro_batch=micro_batch, fused=on, **options)
        found = gradients(model)
        model.zero_grad()
        return found
    found = {}

    class Look(torch.optim.SGD):
        def step(self, closure=None):
            found.update(gradients(model))

    acc = bb.Accumulator(Look(model.parameters(), lr=1.0), every=10**6, **options)
    for part in zip(*(t.split(micro_batch) for t in batch), strict=True):
        if on:
            with acc.micro_batch():
                loss = loss_fn(part)
        else:
            loss = loss_fn(part)
        acc.backward(loss, items=len(part[0]))
    acc.flush()
    return found


def language(model):
    return lambda b: F.cross_entropy(model(b[0]).flatten(0, -2), b[1].flatten())


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(11, (10, 5)), torch.randint(11, (10, 5))


def agree(found, wanted, dtype):
    """Both are sums of at most a hundred rounded terms."""
    for name, w in wanted.items():
        if w is None:
            assert found[name] is None, name
            continue
        tolerance = 100 * torch.finfo(dtype).eps * w.abs().max().item()
        torch.testing.assert_close(found[name], w, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("door", ["split", "stream"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding_idx", [None, 0, -3])
def test_tied_weights_used_several_times_get_autograds_gradient(door, bias, padding_idx, tokens):
    torch.manual_seed(0)
    model = Tied(bias, padding_idx).double()
    wanted = by(door, model, language(model), tokens, 3, on=False)
    found = by(door, model, language(model), tokens, 3, on=True)
    agree(found, wanted, torch.float64)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_any_leading_dimensions(shape):
    model = nn.Linear(4, 3).double()
    x = torch.randn(6, *shape, dtype=torch.float64)

    def loss_fn(b):
        # One call an example, so that an input of one dimension is met too.
        return torch.stack([model(example).square().mean() for example in b[0]]).mean()

    wanted = by("split", model, loss_fn, (x,), 4, on=False)
    agree(by("split", model, loss_fn, (x,), 4, on=True), wanted, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_order_of_the_sums_is_the_same_the_bits_are(dtype, tokens):
    """One micro-batch: one product for each use of a weight, as autograd makes it."""
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 11)).to(dtype)
    wanted = by("split", model, language(model), tokens, 10, on=False)
    found = by("split", model, language(model), tokens, 10, on=True)
    assert all(torch.equal(found[name], w) for name, w in wanted.items())


@pytest.mark.parametrize("door", ["split", "stream"])
def test_narrow_weights_with_wide_sums_keep_their_bits(door, tokens):
    """The product is rounded to bfloat16 once, as autograd's is, and added in float32."""
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 11)).bfloat16()
    wanted = by(door, model, language(model), tokens, 2, on=False)
    found = by(door, model, language(model), tokens, 2, on=True)
    assert all(torch.equal(found[name], w) for name, w in wanted.items())


def test_float64_weights_beside_narrow_ones_and_items_on_the_device(tokens):
    model = nn.Sequential(nn.Embedding(11, 6).double(), nn.Linear(6, 7).double(), nn.Linear(7, 11).bfloat16())

    def loss_fn(b):
        hidden = model[1](model[0](b[0]))
        loss = F.cross_entropy(model[2](hidden.bfloat16()).double().flatten(0, 1), b[1].flatten())
        return loss, torch.tensor(b[0].numel())

    wanted = by("split", model, loss_fn, tokens, 3, on=False)
    agree(by("split", model, loss_fn, tokens, 3, on=True), wanted, torch.float64)


@pytest.mark.parametrize("door", ["split", "stream"])
def test_autocast(door, tokens):
    model = Tied()

    def loss_fn(b):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(b[0])
        assert logits.dtype == torch.bfloat16
        return F.cross_entropy(logits.float().flatten(0, 1), b[1].flatten())

    wanted = by(door, model, loss_fn, tokens, 3, on=False)
    found = by(door, model, loss_fn, tokens, 3, on=True)
    assert all(g.dtype == torch.float32 for g in found.values())
    # A weight used twice has its two bfloat16 gradients added in bfloat16 by autograd, in float32 here.
    agree(found, wanted, torch.bfloat16)


def test_a_weight_cast_under_autocast_still_has_a_gradient_for_its_next_use():
    """Autocast keeps a leaf's cast for its next use; one made without a graph would lose that use's gradient."""
    model = nn.Linear(4, 4, bias=False)
    x = torch.randn(6, 4)

    def loss_fn(b):
        with torch.autocast("cpu", torch.bfloat16):
            return (model(b[0]).float() @ torch.ones(4) + torch.mm(b[0], model.weight).float().sum(1)).mean()

    wanted = by("split", model, loss_fn, (x,), 3, on=False)
    agree(by("split", model, loss_fn, (x,), 3, on=True), wanted, torch.bfloat16)


def test_a_weight_used_elsewhere_too_gets_both_parts(tokens):
    model = Tied().double()

    def loss_fn(b):
        return language(model)(b) + model.out.weight.square().sum() + model.middle.weight.sin().sum()

    wanted = by("split", model, loss_fn, tokens, 3, on=False)
    agree(by("split", model, loss_fn, tokens, 3, on=True), wanted, torch.float64)


def test_a_table_with_sparse_gradients_that_is_also_multiplied_by(tokens):
    table = nn.Parameter(torch.randn(11, 6, dtype=torch.float64))
    model = nn.ParameterList([table])

    def loss_fn(b):
        return F.cross_entropy(F.linear(F.embedding(b[0], table, sparse=True), table).flatten(0, 1), b[1].flatten())

    wanted = by("split", model, loss_fn, tokens, 3, on=False)
    agree(by("split", model, loss_fn, tokens, 3, on=True), wanted, torch.float64)


def test_no_temporary_of_the_weights_size_after_the_first_micro_batch():
    model = nn.Linear(8, 8, bias=False)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=3)
    called = []
    for _ in range(3):
        with acc.micro_batch():
            loss = model(torch.randn(2, 8)).square().mean()
        with Calls() as calls:
            acc.backward(loss, items=2)
        called.append(calls.names)
    assert ("mm" in called[0], "addmm_" in called[0]) == (True, False)
    assert [("mm" in names, names.count("addmm_")) for names in called[1:]] == [(False, 1)] * 2


def test_what_is_in_grad_before_is_added_to(tokens):
    model = Tied().double()
    language(model)(tokens).backward()
    before = gradients(model)
    bb.backward(language(model), tokens, micro_batch=3)
    agree(gradients(model), {name: 2 * g for name, g in before.items()}, torch.float64)


def test_gradients_of_gradients_inside_the_loss(tokens):
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    x = torch.randn(8, 6, dtype=torch.float64)

    def loss_fn(b):
        (at,) = (b[0].detach().requires_grad_(),)
        energy = model(at).sum()
        (force,) = torch.autograd.grad(energy, at, create_graph=True)
        (plain,) = torch.autograd.grad(energy, at, retain_graph=True)
        return (force.square().sum(1) + model(at)[:, 0]).mean() + 0 * plain.sum()

    wanted = by("split", model, loss_fn, (x,), 3, on=False)
    agree(by("split", model, loss_fn, (x,), 3, on=True), wanted, torch.float64)


def test_outside_a_window_the_backward_is_autograds():
    model = nn.Linear(4, 3)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=2)
    x = torch.randn(5, 4)
    with acc.micro_batch():
        loss = model(x).square().mean()
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    model(x).square().mean().backward()
    assert all(torch.equal(found[name], g) for name, g in gradients(model).items())


def test_the_backward_may_stand_inside_the_context_too():
    model = nn.Linear(4, 3)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=2)
    for _ in range(2):
        with acc.micro_batch():
            update = acc.backward(model(torch.randn(5, 4)).square().mean(), items=5)
    assert update.micro_batches == 2


@pytest.mark.parametrize("door", ["split", "stream"])
def test_checkpointing_meets_the_same_functions_again(door, tokens):
    model = Tied().double()
    first, rest = model.embedding, nn.Sequential(model.middle, nn.Tanh(), model.out)

    def loss_fn(b):
        return F.cross_entropy(checkpoint(rest, first(b[0]), use_reentrant=False).flatten(0, 1), b[1].flatten())

    wanted = by(door, model, loss_fn, tokens, 3, on=False)
    agree(by(door, model, loss_fn, tokens, 3, on=True), wanted, torch.float64)


def test_saved_tensors_may_be_kept_elsewhere(tokens):
    model = Tied().double()

    def loss_fn(b):
        with torch.autograd.graph.save_on_cpu():
            return language(model)(b)

    wanted = by("split", model, loss_fn, tokens, 3, on=False)
    agree(by("split", model, loss_fn, tokens, 3, on=True), wanted, torch.float64)


def hook_on_the_gradient(model):
    seen = []
    model.weight.register_hook(lambda g: seen.append(1))
    return model, lambda: len(seen) == 4


def hook_after_accumulation(model):
    seen = []
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(1))
    return model, lambda: len(seen) == 4


def parametrized(model):
    return parametrizations.weight_norm(model), lambda: True


class Named(torch.Tensor):
    """A subclass with nothing of its own."""


def subclass(model):
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Named))
    return model, lambda: True


def column_by_column(model):
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    return model, lambda: True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_on_the_gradient, "hooks"),
        (hook_after_accumulation, "hooks"),
        (parametrized, "parametrization"),
        (subclass, "subclass"),
        (column_by_column, "layout"),
    ],
)
def test_where_it_would_not_be_safe_it_is_autograds_and_says_why(change, reason, caplog):
    model, seen = change(nn.Linear(4, 4).double())
    x = torch.randn(8, 4, dtype=torch.float64)

    def loss_fn(b):
        return model(b[0]).as_subclass(torch.Tensor).square().mean()

    with caplog.at_level(logging.DEBUG, "bigbatch.torch.fused"):
        found = by("split", model, loss_fn, (x,), 2, on=True)
    assert seen()
    assert [reason in record.message for record in caplog.records if "(4, 4)" in record.message] == [True]
    agree(found, by("split", model, loss_fn, (x,), 2, on=False), torch.float64)


def test_small_weights_are_autograds(monkeypatch, caplog):
    monkeypatch.setattr(fused, "SMALLEST", 17)
    model = nn.Linear(4, 4)
    with caplog.at_level(logging.DEBUG, "bigbatch.torch.fused"):
        by("split", model, lambda b: model(b[0]).mean(), (torch.randn(4, 4),), 2, on=True)
    assert "fewer than 17" in caplog.text


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_special_embeddings_are_autograds(options, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, **options), nn.Linear(6, 11)).double()
    wanted = by("split", model, language(model), tokens, 3, on=False)
    found = by("split", model, language(model), tokens, 3, on=True)
    for name, w in wanted.items():
        torch.testing.assert_close(found[name].to_dense(), w.to_dense(), rtol=1e-12, atol=1e-14)


def test_positional_options_of_an_embedding_are_seen_too():
    table = torch.randn(5, 3, requires_grad=True)
    with Fused():
        plain = F.embedding(torch.tensor([1]), table)
        sparse = F.embedding(torch.tensor([1]), table, None, None, 2.0, False, True)
        with pytest.raises(AssertionError, match="num_embeddings"):
            F.embedding(torch.tensor([1]), table, padding_idx=9)
    assert "_Embedding" in type(plain.grad_fn).__name__
    assert "_Embedding" not in type(sparse.grad_fn).__name__


def test_transforms_of_torch_func_inside_the_loss():
    model = nn.Linear(4, 3).double()
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss_fn(b):
        jacobians = torch.func.vmap(torch.func.jacrev(lambda row: torch.tanh(model(row))))(b[0])
        return jacobians.square().mean()

    wanted = by("split", model, loss_fn, (x,), 4, on=False)
    agree(by("split", model, loss_fn, (x,), 4, on=True), wanted, torch.float64)


def test_distributed_data_parallel_sees_the_gradients_that_it_reduces():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(4, 3))
        with Fused():
            reduced = model(torch.randn(2, 4))
            with model.no_sync():
                kept = model(torch.randn(2, 4))
        assert "_Linear" not in type(reduced.grad_fn).__name__
        assert "_Linear" in type(kept.grad_fn).__name__
    finally:
        dist.destroy_process_group()


def test_without_gradients_nothing_is_different():
    model = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    with Fused(), torch.no_grad():
        inside = model(x)
    assert torch.equal(inside, model(x))
    model.requires_grad_(False)
    with Fused():
        assert not model(x).requires_grad


def test_the_module_is_as_it_was_also_after_an_error(tokens):
    model = Tied()
    before, attributes = copy.deepcopy(model.state_dict()), {name: dict(vars(m)) for name, m in model.named_modules()}
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=2)

    def broken(b):
        language(model)(b)
        copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert list(copied.state_dict()) == list(unpickled.state_dict()) == list(before)
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        bb.backward(broken, tokens, micro_batch=3)
    with pytest.raises(RuntimeError, match="broken"), acc.micro_batch():
        broken(tokens)
    assert type(model(tokens[0]).grad_fn).__name__ == "ViewBackward0"
    assert {name: dict(vars(m)) for name, m in model.named_modules()} == attributes
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_error_in_the_backward_leaves_nothing_behind(tokens):
    model = Tied().double()
    wanted = by("split", model, language(model), tokens, 3, on=False)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=2)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError("broken")

    with acc.micro_batch():
        loss = F.cross_entropy(model.out(Broken.apply(model.embedding(tokens[0]))).flatten(0, 1), tokens[1].flatten())
    with pytest.raises(RuntimeError, match="broken"):
        acc.backward(loss, items=10)
    assert all(p.grad is None for p in model.parameters())
    agree(by("split", model, language(model), tokens, 3, on=True), wanted, torch.float64)


def test_private_names_are_where_they_were():
    p = nn.Parameter(torch.ones(2))
    assert p._backward_hooks is None
    assert p._post_accumulate_grad_hooks is None
    assert torch._C._functorch.maybe_current_level() is None
    assert torch.func.vmap(lambda x: x * torch._C._functorch.maybe_current_level())(torch.ones(2)).tolist() == [1, 1]
    assert DistributedDataParallel._get_active_ddp_module() is None


@pytest.mark.parametrize("door", ["split", "stream"])
def test_the_peak_does_not_grow_with_the_window_and_is_below_the_hand_written_loops(door):
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def peak(n, door):
        x = torch.randn(n, 2, 64)
        with PeakMemory() as memory:
            if door == "split":
                bb.backward(lambda b: model(b[0]).square().mean(), (x,), micro_batch=1)
                optimizer.step()
                optimizer.zero_grad()
            elif door == "stream":
                acc = bb.Accumulator(optimizer, every=n)
                for part in x.split(1):
                    with acc.micro_batch():
                        loss = model(part).square().mean()
                    acc.backward(loss, items=1)
            else:
                for part in x.split(1):
                    (model(part).square().mean() / n).backward()
                optimizer.step()
                optimizer.zero_grad()
        return memory.peak

    assert peak(1024, door) <= 1.02 * peak(2, door)
    assert peak(16, door) < 0.7 * peak(16, "hand-written")
