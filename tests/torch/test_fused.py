"""Weight gradients straight into the sums: autograd's numbers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb
from bigbatch.engines.torch_hooks import has_hooks
from bigbatch.fused import torch_backward, torch_graph
from bigbatch.fused.torch_proof import Proof
from conformance.torch_products import takes_products

from .products import Tied, agree, by, gradients, language

pytestmark = pytest.mark.usefixtures("whatever_its_size")


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
    """A CPU rounds the product to bfloat16 once, as autograd does. Rows are added in float32, unrounded."""
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 11)).bfloat16()
    wanted = by(door, model, language(model), tokens, 2, on=False)
    found = by(door, model, language(model), tokens, 2, on=True)
    agree({"0.weight": found.pop("0.weight")}, {"0.weight": wanted.pop("0.weight")}, torch.bfloat16)
    assert all(torch.equal(found[name], w) for name, w in wanted.items())


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_rows_go_into_wide_sums_with_items_on_the_device(padding_idx, tokens):
    model = nn.Sequential(nn.Embedding(11, 6, padding_idx=padding_idx), nn.Linear(6, 11).bfloat16())
    model[0].register_forward_hook(lambda module, args, out: out.bfloat16())

    def loss_fn(b):
        return F.cross_entropy(model(b[0]).flatten(0, 1), b[1].flatten()), (b[1] != 4).sum()

    wanted = by("split", model, loss_fn, tokens, 3, on=False)
    found = by("split", model, loss_fn, tokens, 3, on=True)
    agree(found, wanted, torch.float32)


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


def test_a_window_of_one_is_the_plain_step_to_the_bit(tokens):
    wanted, found = [], []
    for results, on in ((wanted, None), (found, True)):
        torch.manual_seed(0)
        model = Tied()
        optimizer = torch.optim.AdamW(model.parameters())
        acc = bb.Accumulator(optimizer, every=1)
        for part in zip(*(t.split(3) for t in tokens), strict=True):
            if on:
                acc.backward(language(model)(part), items=3)
            else:
                language(model)(part).backward()
                optimizer.step()
                optimizer.zero_grad()
        results += model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


WAYS = {
    "x @ W": lambda x, w: x @ w,
    "x @ W.t()": lambda x, w: x @ w.t(),
    "x @ W.T": lambda x, w: x @ w.T,
    "x @ W.mT": lambda x, w: x @ w.mT,
    "transpose": lambda x, w: x @ w.transpose(-1, 0),
    "transposed twice": lambda x, w: x @ w.t().transpose(0, 1),
    "transposed to itself": lambda x, w: x @ w.transpose(1, -1),
    "permute": lambda x, w: x @ w.permute(-1, 0),
    "permuted to itself": lambda x, w: x @ w.permute(0, 1),
    "addmm": lambda x, w: torch.addmm(w[0], x, w),
    "addmm, scaled": lambda x, w: torch.addmm(w[0].detach(), x, w, alpha=2.0, beta=3.0),
    "W @ x": lambda x, w: w @ x.t(),
    "W @ W": lambda x, w: x @ (w @ w),
    "cast": lambda x, w: (x.float() @ w.float()).double(),
    "a part": lambda x, w: x[:, :3] @ w[:3],
    "einsum": lambda x, w: torch.einsum("ni,io->no", x, w),
    "into a view": lambda x, w: torch.zeros(len(x) + 1, 6, dtype=x.dtype)[1:].addmm_(x, w),
    "a sparse input": lambda x, w: torch.sparse.mm(x.detach().to_sparse(), w),
    "frozen beside": lambda x, w: x @ w.detach() + x @ w,
}


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_multiply_by_a_weight(way):
    weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
    model = nn.ParameterList([weight])
    x = torch.randn(9, 6, dtype=torch.float64)

    def loss_fn(b):
        return torch.tanh(WAYS[way](b[0], weight)).square().mean()

    wanted = by("split", model, loss_fn, (x,), 2, on=False)
    tolerance = torch.float32 if way == "cast" else torch.float64
    agree(by("split", model, loss_fn, (x,), 2, on=True), wanted, tolerance)


@takes_products
def test_the_ways_that_models_are_written_in_are_taken():
    weight = nn.Parameter(torch.randn(6, 6))

    def products(way):
        return torch_graph.read(way(torch.randn(2, 6), weight).sum(), Proof()).has_products

    taken = [name for name, way in WAYS.items() if products(way)]
    for name in ("x @ W", "x @ W.t()", "x @ W.T", "x @ W.mT", "transpose", "permute", "transposed twice"):
        assert name in taken
    for name in ("addmm, scaled", "W @ x", "W @ W", "a part", "into a view", "a sparse input"):
        assert name not in taken


def test_what_is_in_grad_before_is_added_to(tokens):
    model = Tied().double()
    language(model)(tokens).backward()
    before = gradients(model)
    bb.backward(language(model), tokens, micro_batch=3)
    agree(gradients(model), {name: 2 * g for name, g in before.items()}, torch.float64)


def test_hooks_on_what_a_layer_returns_are_seen_first():
    model = nn.Linear(6, 5).double()
    x = torch.randn(8, 6, dtype=torch.float64)

    def loss_fn(b):
        y = model(b[0])
        y.register_hook(lambda grad: 3 * grad)
        return y.square().mean()

    wanted = by("split", model, loss_fn, (x,), 2, on=False)
    agree(by("split", model, loss_fn, (x,), 2, on=True), wanted, torch.float64)


def test_leaves_that_are_no_parameters_get_their_gradients_too():
    model, x = nn.Linear(6, 5).double(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=2)
    acc.backward(model(x).square().mean(), items=4)
    found, x.grad = x.grad, None
    model(x).square().mean().backward()
    torch.testing.assert_close(found, x.grad / 2)


@takes_products
def test_a_graph_that_is_kept_has_no_hooks_left():
    model = nn.Linear(6, 5)
    proof, taken = Proof(), []

    class Sums:
        def product(self, weight, left, right):
            taken.append(weight)
            raise RuntimeError("broken")

    for compared in (True, False):
        loss = model(torch.randn(4, 6)).square().mean()
        graph = torch_graph.read(loss, proof)
        assert [len(graph.tried), len(graph.uses)] == [compared, not compared]
        with pytest.raises(RuntimeError, match="broken"):
            torch_backward.differentiate(loss, None, graph, Sums())
        (use,) = graph.tried or graph.uses
        assert use.node.next_functions  # alive, and could be run by somebody else
        assert not has_hooks(use.node)
        assert not has_hooks(use.accumulation)
    assert len(taken) == 2


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
    acc.backward(language(model)(tokens), items=10)
    with pytest.raises(RuntimeError, match="broken"):
        broken(tokens)
    acc.reset()
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

    acc.backward(language(model)(tokens), items=10)
    loss = F.cross_entropy(model.out(Broken.apply(model.embedding(tokens[0]))).flatten(0, 1), tokens[1].flatten())
    with pytest.raises(RuntimeError, match="broken"):
        acc.backward(loss, items=10)
    assert all(p.grad is None for p in model.parameters())
    agree(by("split", model, language(model), tokens, 3, on=True), wanted, torch.float64)
