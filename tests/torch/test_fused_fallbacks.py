"""What is left to autograd, and why: where it would not be safe to take a weight's gradient, or not be worth it."""

import logging

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import bigbatch.torch as bb
from bigbatch.fused import torch_backward, torch_limits
from bigbatch.fused.torch_deferred import DeferredSum
from bigbatch.fused.torch_limits import LIMITS, worth_fusing
from conformance.torch_products import limits

from .products import Tied, agree, by, called, language

pytestmark = pytest.mark.usefixtures("whatever_its_size")


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


class Twice(torch.autograd.Function):
    """Its backward could be anything, a reentrant checkpoint's too."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, *grads):
        return 2 * grads[0]


def with_a_function(model):
    model.register_forward_hook(lambda module, args, output: Twice.apply(output))
    return model, lambda: True


def used_elsewhere(model):
    model.register_forward_hook(lambda module, args, output: output + module.weight.sum())
    return model, lambda: True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hook_on_the_gradient, "hooks"),
        (hook_after_accumulation, "hooks"),
        (parametrized, "not only"),
        (subclass, "subclass"),
        (column_by_column, "layout"),
        (with_a_function, "TwiceBackward"),
        (used_elsewhere, "not only"),
    ],
)
def test_where_it_would_not_be_safe_it_is_autograds_and_says_why(change, reason, caplog):
    model, seen = change(nn.Linear(4, 4).double())
    x = torch.randn(8, 4, dtype=torch.float64)

    def loss_fn(b):
        return model(b[0]).as_subclass(torch.Tensor).square().mean()

    with caplog.at_level(logging.DEBUG, "bigbatch.torch.products"):
        found = by("split", model, loss_fn, (x,), 2, on=True)
    assert seen()
    assert [reason in record.message for record in caplog.records if "(4, 4)" in record.message] == [True]
    agree(found, by("split", model, loss_fn, (x,), 2, on=False), torch.float64)


def test_small_weights_are_autograds(caplog):
    model = nn.Linear(4, 4)
    with limits(cpu_elements=17), caplog.at_level(logging.DEBUG, "bigbatch.torch.products"):
        by("split", model, lambda b: model(b[0]).mean(), (torch.randn(4, 4),), 2, on=True)
    assert "it is so small that" in caplog.text


@pytest.mark.parametrize(
    ("shape", "rows", "worth"),
    [((2048, 2048), 2048, True), ((2048, 2048), 1024, False), ((8192, 8192), 1, True), ((1024, 1024), 10**9, True)],
)
def test_beside_a_device_it_is_the_work_that_counts(shape, rows, worth):
    """A device that exists everywhere stands for a GPU."""
    weight = torch.empty(shape, device="meta")
    with limits(**LIMITS._asdict()):
        assert worth_fusing(weight, rows) == worth
        assert worth_fusing(weight) == (weight.numel() >= 1 << 22)
        assert worth_fusing(torch.empty(shape), rows)
        assert DeferredSum([weight])._weights == set()


@pytest.mark.parametrize("door", ["split", "stream"])
def test_where_the_first_graph_has_no_products_the_next_are_not_searched(door, monkeypatch, tokens):
    searched = []
    read = torch_backward.read

    def noting(loss, proof, explain=False):
        searched.append(True)
        return read(loss, proof, explain)

    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    with monkeypatch.context() as patch:
        patch.setattr(torch_limits, "worth_fusing", lambda weight, rows=None: rows is None)
        patch.setattr(torch_backward, "read", noting)
        by(door, model, language(model), tokens, 2, on=True)
    assert searched == [True]


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_special_embeddings_are_autograds(options, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, **options), nn.Linear(6, 11)).double()
    wanted = by("split", model, language(model), tokens, 3, on=False)
    found = by("split", model, language(model), tokens, 3, on=True)
    for name, w in wanted.items():
        torch.testing.assert_close(found[name].to_dense(), w.to_dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("door", ["split", "stream"])
def test_what_is_checkpointed_is_autograds(door, tokens):
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


def test_a_loss_from_a_reentrant_checkpoint(tokens):
    model = Tied().double()
    middle = nn.Sequential(model.middle, nn.Tanh())

    def loss_of(middle):
        return lambda b: F.cross_entropy(model.out(middle(model.embedding(b[0]))).flatten(0, 1), b[1].flatten())

    wanted = by("stream", model, loss_of(middle), tokens, 3, on=False)
    reentrant = loss_of(lambda x: checkpoint(middle, x, use_reentrant=True))
    agree(by("stream", model, reentrant, tokens, 3, on=True), wanted, torch.float64)


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


def test_transforms_of_torch_func_inside_the_loss():
    model = nn.Linear(4, 3).double()
    x = torch.randn(6, 4, dtype=torch.float64)

    def loss_fn(b):
        jacobians = torch.func.vmap(torch.func.jacrev(lambda row: torch.tanh(model(row))))(b[0])
        return jacobians.square().mean()

    wanted = by("split", model, loss_fn, (x,), 4, on=False)
    agree(by("split", model, loss_fn, (x,), 4, on=True), wanted, torch.float64)


def test_where_other_ranks_may_wait_for_a_gradient_all_are_autograds():
    """A wrapper that bigbatch was not told of, such as DistributedDataParallel of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(8, 8, bias=False))
        seen = []
        model.register_comm_hook(None, lambda _, bucket: seen.append(bucket) or _done(bucket))
        acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=3)
        assert [called(acc, model) for _ in range(2)] == [["mm"], ["mm"]]
        assert len(seen) == 2
    finally:
        dist.destroy_process_group()


def _done(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
