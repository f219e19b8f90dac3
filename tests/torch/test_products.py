"""Weight gradients straight into the sums, some of them late: autograd's numbers, and its work where it must be."""

import copy
import io
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
from bigbatch.engines import torch_graph, torch_products
from bigbatch.engines.torch_memory import PeakMemory
from bigbatch.engines.torch_products import Products
from conformance.torch_products import takes_products

rows_for, is_worth, SMALL = torch_products.rows_for, torch_graph.is_worth, torch_products.SMALL


@pytest.fixture(autouse=True)
def whatever_its_size(monkeypatch):
    """Rows of weights as small as these would take more room than a gradient, so there is room for a few rows only."""
    monkeypatch.setattr(torch_graph, "is_worth", lambda *_: True)
    monkeypatch.setattr(torch_products, "ROWS", 8)
    monkeypatch.setattr(torch_products, "SMALL", 0)
    monkeypatch.setattr(torch_products, "rows_for", lambda weights: 4)


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

    acc = bb.Accumulator(Look(model.parameters(), lr=1.0), every=10**6, fused=on, **options)
    for part in zip(*(t.split(micro_batch) for t in batch), strict=True):
        acc.backward(loss_fn(part), items=len(part[0]))
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


def called(acc, model, rows=2):
    """The products of one micro-batch's backward."""
    loss = model(torch.randn(rows, 8)).square().mean()
    with Calls() as calls:
        acc.backward(loss, items=rows)
    return [name for name in calls.names if "mm" in name]


@takes_products
def test_products_wait_until_they_are_many_and_the_first_of_them_is_the_sum():
    model = nn.Linear(8, 8, bias=False)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=6)
    # Two rows each, and room for four: the third micro-batch has to make room, and so has the fifth.
    assert [called(acc, model) for _ in range(5)] == [[], [], ["mm"], [], ["addmm_"]]
    assert called(acc, model) == ["addmm_"]  # the end


@takes_products
def test_products_of_many_rows_do_not_wait():
    model = nn.Linear(8, 8, bias=False)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=4)
    assert [called(acc, model, rows=3) for _ in range(3)] == [["mm"], ["addmm_"], ["addmm_"]]


@takes_products
@pytest.mark.parametrize(("width", "waits"), [(31, False), (32, True)])
def test_rows_wait_where_they_are_an_eighth_of_the_weight(width, waits, monkeypatch):
    monkeypatch.setattr(torch_products, "SMALL", SMALL)
    model = nn.Linear(width, width, bias=False)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=4)
    acc.backward(model(torch.randn(2, width)).square().mean(), items=2)
    assert (model.weight.grad is None) == waits


def test_what_waits_takes_less_than_the_largest_weight(monkeypatch):
    monkeypatch.setattr(torch_products, "ROWS", 256)
    weights = [torch.empty(1024, 784), torch.empty(1024, 1024)]
    assert rows_for(weights) == 7 * 1024 * 1024 // (8 * (1024 + 784 + 2 * 1024)) == 237
    assert rows_for(weights[:1]) == 256, "more gain nothing"
    assert rows_for([]) == 0


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
            assert model[0].weight.grad is None, "it waits"
            acc.flush()
        else:
            loss.backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@takes_products
def test_rows_looked_up_go_into_a_sum_whose_products_wait():
    """A table at both ends: the head's rows come first, and wait."""
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


@pytest.mark.parametrize("stop", range(1, 6))
def test_saved_while_rows_wait_it_goes_on_to_the_bit(stop):
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
def test_rows_that_wait_never_reach_the_next_window(broken):
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


def test_inputs_may_be_written_over_while_their_rows_wait():
    """A loader may fill one buffer again and again."""
    model, found = nn.Linear(8, 8).double(), []
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    for reused in (False, True):
        acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.0), every=10)
        buffer = torch.empty(2, 8, dtype=torch.float64)
        for part in x:
            acc.backward(model(buffer.copy_(part) if reused else part).square().mean(), items=2)
        acc._window.gradients([])
        found.append(gradients(model))
        acc.reset()
    agree(found[1], found[0], torch.float64)


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
    taken = [name for name, way in WAYS.items() if torch_graph.read(way(torch.randn(2, 6), weight).sum()).uses]
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


def test_small_weights_are_autograds(monkeypatch, caplog):
    monkeypatch.setattr(torch_graph, "is_worth", lambda weight, rows=None: weight.numel() > 16)
    model = nn.Linear(4, 4)
    with caplog.at_level(logging.DEBUG, "bigbatch.torch.products"):
        by("split", model, lambda b: model(b[0]).mean(), (torch.randn(4, 4),), 2, on=True)
    assert "it is so small that" in caplog.text


@pytest.mark.parametrize(
    ("shape", "rows", "worth"),
    [((2048, 2048), 2048, True), ((2048, 2048), 1024, False), ((8192, 8192), 1, True), ((1024, 1024), 10**9, True)],
)
def test_beside_a_device_it_is_the_work_that_counts(shape, rows, worth):
    """A device that exists everywhere stands for a GPU."""
    weight = torch.empty(shape, device="meta")
    assert is_worth(weight, rows) == worth
    assert is_worth(weight) == (weight.numel() >= 1 << 22)
    assert is_worth(torch.empty(shape), rows)
    assert Products([weight])._weights == set()


@pytest.mark.parametrize("door", ["split", "stream"])
def test_where_the_first_graph_has_no_products_the_next_are_not_searched(door, monkeypatch, tokens):
    searched = []
    read = torch_graph.read

    def noting(loss, products=True, explain=False):
        searched.append(products)
        return read(loss, products, explain)

    monkeypatch.setattr(torch_graph, "is_worth", lambda weight, rows=None: rows is None)
    monkeypatch.setattr(torch_graph, "read", noting)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 11))
    by(door, model, language(model), tokens, 2, on=True)
    assert searched == ([True, False, False, False, False] if door == "split" else [True])


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_special_embeddings_are_autograds(options, tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, **options), nn.Linear(6, 11)).double()
    wanted = by("split", model, language(model), tokens, 3, on=False)
    found = by("split", model, language(model), tokens, 3, on=True)
    for name, w in wanted.items():
        torch.testing.assert_close(found[name].to_dense(), w.to_dense(), rtol=1e-12, atol=1e-14)


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
    loss = model(torch.randn(4, 6)).square().mean()
    graph = torch_graph.read(loss)
    assert len(graph.uses) == 1
    taken = []

    class Sums:
        def product(self, weight, left, right):
            taken.append(weight)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        torch_graph.differentiate(loss, None, graph, Sums())
    assert graph.uses[0].node.next_functions  # alive, and could be run by somebody else
    loss = model(torch.randn(4, 6)).square().mean()
    loss.backward()
    assert len(taken) == 1


def test_a_loss_from_a_reentrant_checkpoint(tokens):
    model = Tied().double()
    middle = nn.Sequential(model.middle, nn.Tanh())

    def loss_of(middle):
        return lambda b: F.cross_entropy(model.out(middle(model.embedding(b[0]))).flatten(0, 1), b[1].flatten())

    wanted = by("stream", model, loss_of(middle), tokens, 3, on=False)
    reentrant = loss_of(lambda x: checkpoint(middle, x, use_reentrant=True))
    agree(by("stream", model, reentrant, tokens, 3, on=True), wanted, torch.float64)


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


@takes_products
def test_private_names_are_where_they_were():
    p = nn.Parameter(torch.ones(2, 2))
    assert p._backward_hooks is None
    assert p._post_accumulate_grad_hooks is None
    node = (torch.ones(1, 2) @ p).grad_fn
    assert node._raw_saved_self.unpack_hook is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert (torch.ones(1, 2) @ p).grad_fn._raw_saved_self.unpack_hook is not None
    looked_up = F.embedding(torch.tensor([1]), p).grad_fn
    assert torch_graph._signed(looked_up._saved_padding_idx) == -1


@takes_products
@pytest.mark.parametrize("door", ["split", "stream"])
def test_the_peak_does_not_grow_with_the_window_and_is_below_the_hand_written_loops(door, monkeypatch):
    monkeypatch.setattr(torch_products, "ROWS", 256)
    monkeypatch.setattr(torch_products, "rows_for", rows_for)
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

    assert peak(1024, door) <= 1.02 * peak(2, door)
    assert peak(16, door) < peak(16, "hand-written")
    monkeypatch.setattr(torch_products, "rows_for", lambda weights: 4)
    assert peak(16, door) < 0.7 * peak(16, "hand-written"), "but for what waits there is one sum"
