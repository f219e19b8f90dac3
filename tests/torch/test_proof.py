"""A weight's product is compared with what autograd makes before it replaces it, on each route that leads to it."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb
from bigbatch.fused import torch_backward, torch_graph
from bigbatch.fused.torch_deferred import DeferredSum
from bigbatch.fused.torch_proof import Proof, Use, is_product
from conformance import jobs
from conformance.adapters.torch import ADAPTERS
from conformance.torch_products import limits, takes_products

from .products import Calls, agree, by

F64 = torch.float64


pytestmark = pytest.mark.usefixtures("whatever_its_size")


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(6, 6, dtype=F64))


def taken(monkeypatch):
    """How many uses of weights went past autograd, of each backward, and how many were compared."""
    counts = []
    differentiate = torch_backward.differentiate

    def counting(loss, gradient, graph, sums):
        counts.append((len(graph.uses), len(graph.tried)))
        differentiate(loss, gradient, graph, sums)

    monkeypatch.setattr(torch_backward, "differentiate", counting)
    return counts


def halved(x):
    x.register_hook(lambda g: g * 0.5)
    return x


def retained(x):
    x.retain_grad()
    return x


def in_front(x):
    x.grad_fn.register_prehook(lambda grads: (grads[0] * 0.5,))
    return x


def behind(x):
    x.grad_fn.register_hook(lambda grads, outs: tuple(None if g is None else g * 0.5 for g in grads))
    return x


HIDDEN = {
    "a hook on the transpose": lambda x, w: x @ halved(w.t()),
    "a hook on a cast copy": lambda x, w: x @ halved(w.to(F64, copy=True)),
    "a hook on a cast copy's transpose": lambda x, w: F.linear(x, halved(w.to(F64, copy=True))),
    "a hook before the transpose's node": lambda x, w: x @ in_front(w.t()),
    "a hook after the transpose's node": lambda x, w: x @ behind(w.t()),
    "a hook after the product's node": lambda x, w: behind(x @ w),
    "complex factors": lambda x, w: (x.to(torch.complex128) @ w.to(torch.complex128) * (1 + 2j)).abs(),
    "a real cast of a complex cast": lambda x, w: (x @ w.to(torch.complex128).real).tanh(),
}


@pytest.mark.parametrize("door", ["split", "stream"])
@pytest.mark.parametrize("way", HIDDEN)
def test_what_a_graph_does_not_show_is_autograds(door, way, weight):
    model, x = nn.ParameterList([weight]), torch.randn(9, 6, dtype=F64)

    def loss_fn(b):
        return HIDDEN[way](b[0], weight).square().mean()

    wanted = by(door, model, loss_fn, (x,), 2, on=False)
    agree(by(door, model, loss_fn, (x,), 2, on=True), wanted, F64)


@pytest.mark.parametrize("door", ["split", "stream"])
@pytest.mark.parametrize("first", range(4))
def test_a_hook_from_some_micro_batch_on_is_called_in_each(door, first, weight):
    """Its graph looks as before."""
    model, x, seen, calls = nn.ParameterList([weight]), torch.randn(8, 6, dtype=F64), [], []

    def loss_fn(b):
        calls.append(None)
        turned = weight.t()
        if len(calls) > first:
            turned.register_hook(lambda g: seen.append(g.shape))
        return (b[0] @ turned).square().mean()

    by(door, model, loss_fn, (x,), 2, on=True)
    assert len(seen) == 4 - first


@takes_products
def test_a_transpose_that_is_kept_keeps_its_hooks(weight, monkeypatch):
    """No hook is registered after the first micro-batch, and the hook changes nothing: it only looks."""
    counts, seen, kept = taken(monkeypatch), [], weight.t()
    kept.register_hook(lambda g: seen.append(g.shape))
    acc = bb.Accumulator(torch.optim.SGD([weight], lr=0.0), every=4)
    for x in torch.randn(4, 2, 6, dtype=F64):
        acc.backward((x @ kept).square().mean(), items=2)
    assert len(seen) == 4
    assert not any(map(any, counts))


@takes_products
@pytest.mark.parametrize("door", ["split", "stream"])
@pytest.mark.parametrize("copy", [lambda w: w.t(), lambda w: w.to(F64, copy=True)])
def test_a_copy_that_retains_its_gradient_has_it_after_each_micro_batch(door, copy, weight, caplog):
    model, x, copies = nn.ParameterList([weight]), torch.randn(8, 6, dtype=F64), []

    def loss_fn(b):
        copies.append(retained(copy(weight)))
        return (b[0] @ copies[-1]).square().mean()

    by(door, model, loss_fn, (x,), 2, on=True)
    assert all(made.grad is not None for made in copies)
    assert len(copies) == 4
    assert "retains its gradient" in caplog.text


@takes_products
@pytest.mark.parametrize("door", ["split", "stream"])
def test_what_differs_is_said_once_and_the_rest_goes_on(door, monkeypatch, caplog):
    """Saved by nobody's hook, and not on the list of what is refused: a node whose name lies."""
    counts = taken(monkeypatch)
    parts = Use.parts
    wrong = nn.Parameter(torch.randn(5, 6, dtype=F64))
    model = nn.ParameterList([wrong, torch.randn(6, 5, dtype=F64)])
    x = torch.randn(10, 6, dtype=F64)

    def doubled(use, grad):
        left, right = parts(use, grad)
        return left, 2 * right if use.weight is wrong else right

    def loss_fn(b):
        return F.linear(torch.tanh(F.linear(b[0], wrong)), model[1]).square().mean()

    wanted = by(door, model, loss_fn, (x,), 2, on=False)
    monkeypatch.setattr(Use, "parts", doubled)
    with caplog.at_level(logging.WARNING, "bigbatch"):
        agree(by(door, model, loss_fn, (x,), 2, on=True), wanted, F64)
        agree(by(door, model, loss_fn, (x,), 2, on=True), wanted, F64)
    said = [record for record in caplog.records if "(5, 6)" in record.getMessage()]
    assert len(said) == (1 if door == "split" else 2), "once for each Accumulator"
    assert said[0].levelno == logging.WARNING
    assert counts[:5] == [(0, 2), (1, 0), (1, 0), (1, 0), (1, 0)]


@takes_products
@pytest.mark.parametrize("door", ["split", "stream"])
def test_a_new_route_is_compared_when_it_first_appears(door, weight, monkeypatch):
    counts, calls = taken(monkeypatch), []
    model, x = nn.ParameterList([weight]), torch.randn(10, 6, dtype=F64)

    def loss_fn(b):
        calls.append(None)
        return (b[0] @ (weight if len(calls) % 5 != 3 else weight.t())).square().mean()

    wanted = by(door, model, loss_fn, (x,), 2, on=False)
    calls.clear()
    agree(by(door, model, loss_fn, (x,), 2, on=True), wanted, F64)
    assert counts == [(0, 1), (1, 0), (0, 1), (1, 0), (1, 0)]


@takes_products
@pytest.mark.parametrize("door", ["split", "stream"])
def test_a_weight_that_is_not_finite_at_first_is_compared_later(door, weight, monkeypatch):
    counts, x = taken(monkeypatch), torch.randn(8, 6, dtype=F64)
    acc = bb.Accumulator(torch.optim.SGD([weight], lr=0.0), every=4, nonfinite="skip")
    for part in [x[:2] * torch.inf, *x[2:].split(2)]:
        acc.backward((part @ weight).mean(), items=2)
    assert counts == [(0, 1), (0, 1), (1, 0), (1, 0)]


@takes_products
@pytest.mark.parametrize("door", ["split", "stream"])
def test_where_hooks_are_registered_all_is_compared_anew_and_left_to_autograd_where_they_always_are(
    door, weight, monkeypatch
):
    counts, calls, x = taken(monkeypatch), [], torch.randn(14, 6, dtype=F64)

    def loss_fn(b):
        calls.append(None)
        out = b[0] @ weight
        if len(calls) in (3, 5, 6):
            out.register_hook(lambda g: 0.5 * g)
        return out.square().mean()

    by(door, nn.ParameterList([weight]), loss_fn, (x,), 2, on=True)
    assert counts == [(0, 1), (1, 0), (0, 1), (1, 0), (0, 1), (0, 0), (1, 0)]


@takes_products
def test_comparing_changes_no_bit_of_an_update():
    """Where the rows are deferred the order of the sums is not autograd's; what was compared is in the same order."""
    results = []
    for compared in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=6)
        tokens = torch.randint(11, (6, 3))
        if not compared:
            acc.backward(model(tokens[0]).square().mean(), items=3)
            acc.reset()
        for part in tokens:
            acc.backward(model(part).square().mean(), items=3)
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_users_random_numbers_are_as_they_were(weight):
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    bb.backward(lambda b: (b[0] @ weight).square().mean(), (torch.ones(4, 6, dtype=F64),), micro_batch=2)
    assert torch.equal(torch.randn(3), expected)


@takes_products
def test_later_windows_cost_nothing(weight):
    acc = bb.Accumulator(torch.optim.SGD([weight], lr=0.0), every=2)

    def window():
        for x in torch.randn(2, 5, 6, dtype=F64):
            acc.backward((x @ weight).square().mean(), items=5)

    window()
    with Calls() as calls:
        window()
    products = [name for name in calls.names if "mm" in name]
    assert products == ["mm", "mm", "mm", "addmm_"], "two forwards, and what their rows add"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5, 3), (300, 40, 700), (2000, 130, 20)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_rounding_is_no_difference_and_a_difference_is_none_of_rounding(dtype, shape, shift):
    rows, height, width = shape
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(height, width, generator=generator).to(dtype))
    left = (torch.randn(rows, height, generator=generator) + shift).to(dtype)
    right = torch.randn(rows, width, generator=generator).to(dtype)
    use = Use(None, weight, 1, False, [], None, ())
    gradient, given = left.t().mm(right), [(use, (left, right))]
    assert is_product(weight, given, gradient)
    assert is_product(weight, given, (left.double().t() @ right.double()).to(dtype))
    assert not is_product(weight, given, 0.5 * gradient)
    one_row = gradient.clone()
    one_row[1] = 0
    assert not is_product(weight, given, one_row)
    if dtype == torch.float64:
        assert not is_product(weight, given, gradient * (1 + 1e-9))
    assert is_product(weight, given, gradient * torch.nan) is None


@pytest.mark.parametrize("size", [1e-24, 1e-30, 1e24, 1e30])
def test_numbers_whose_squares_float32_does_not_hold_are_compared_too(size):
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(50, 20, generator=generator) for _ in range(2))
    left *= size
    given, gradient = (
        [(Use(None, nn.Parameter(torch.zeros(20, 20)), 1, False, [], None, ()), (left, right))],
        left.t() @ right,
    )
    assert is_product(given[0][0].weight, given, gradient)
    gradient[3] *= 1 + 1e-3
    assert not is_product(given[0][0].weight, given, gradient)


@takes_products
@pytest.mark.parametrize("door", ["split", "stream"])
@pytest.mark.parametrize("hook", ["register_hook", "register_prehook"])
def test_hooks_on_the_node_that_adds_up_are_called(door, hook, weight):
    model, x, seen = nn.ParameterList([weight]), torch.randn(8, 6, dtype=F64), []
    node = torch.autograd.graph.get_gradient_edge(weight).node
    getattr(node, hook)(lambda *_: seen.append(None))
    by(door, model, lambda b: (b[0] @ weight).square().mean(), (x,), 2, on=True)
    assert len(seen) == 4


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook")
@pytest.mark.parametrize("old", [True, False])
def test_hooks_of_modules_are_called_in_each_micro_batch(old):
    model, seen = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double(), []
    last = model[1]
    (last.register_backward_hook if old else last.register_full_backward_hook)(lambda *_: seen.append(None))
    by("stream", model, lambda b: model(b[0]).square().mean(), (torch.randn(8, 6, dtype=F64),), 2, on=True)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", ["linear", "table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("door", ["split", "stream"])
def test_no_rows_at_all_are_a_gradient_of_zeros(kind, dtype, door):
    idle = nn.Linear(6, 6, bias=False) if kind == "linear" else nn.Embedding(5, 6)
    model = nn.ModuleList([nn.Linear(6, 6), idle]).to(dtype)
    nobody = torch.ones(0, 6, dtype=dtype) if kind == "linear" else torch.ones(0, dtype=torch.int64)

    def loss_fn(b):
        return (model[0](b[0]).sum() + idle(nobody).sum()) / 8

    wanted = by(door, model, loss_fn, (torch.randn(8, 6, dtype=dtype),), 2, on=False)
    found = by(door, model, loss_fn, (torch.randn(8, 6, dtype=dtype),), 2, on=True)
    assert wanted["1.weight"].count_nonzero() == found["1.weight"].count_nonzero() == 0


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="PyTorch before 2.10 has none")
@pytest.mark.parametrize("door", ["split", "stream"])
@pytest.mark.parametrize(
    ("own", "of_gradient"),
    [(torch.bfloat16, torch.float32), (torch.float32, F64), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
)
def test_gradients_of_another_dtype_than_the_weights(door, own, of_gradient):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).to(own)
    exact = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    exact.load_state_dict(model.state_dict())
    for p in model.parameters():
        p.grad_dtype = of_gradient
    x = torch.randn(8, 6).to(own)
    found = by(door, model, lambda b: model(b[0]).double().square().mean(), (x,), 2, on=True)
    assert {g.dtype for g in found.values()} == {of_gradient or own}
    wanted = by(door, exact, lambda b: exact(b[0]).square().mean(), (x.double(),), 2, on=False)
    agree({name: g.double() for name, g in found.items()}, wanted, torch.bfloat16)


@takes_products
@pytest.mark.parametrize("kind", [a for a in ADAPTERS if "fused" in a.name], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("job", "weights"), [("net", 2), ("missing", 2), ("dropout", 1), ("mean", 1)])
def test_the_laws_run_with_products(kind, job, weights, monkeypatch):
    """In the windows of the fused adapters all but the first micro-batch's are taken, and compared in that one."""
    counts = taken(monkeypatch)
    run = kind.start(jobs.Spec(job, jobs.params(job)))
    run.window(jobs.window(job, (3, 3, 3, 3), seed=0))
    assert counts == [(0, weights), *[(weights, 0)] * 3]


@takes_products
def test_a_factor_elsewhere_than_its_weight_is_autograds():
    """A device that exists everywhere stands for a GPU."""
    weight = nn.Parameter(torch.randn(6, 6))
    loss = (torch.ones(2, 6, device="meta") @ weight.to("meta")).sum()
    assert not torch_graph.read(loss, Proof()).has_products


def test_a_use_that_saw_no_gradient_leaves_the_weight_to_autograd(weight):
    """Its sum is then what other nodes give, and no product of its own."""
    assert is_product(weight, [], torch.zeros_like(weight))  # so that it must not be asked
    x = torch.ones(2, 6, dtype=F64)
    sums = DeferredSum()
    loss = (x @ weight).sum() * 0 + weight.t().sum()
    torch_backward.differentiate(loss, None, torch_graph.read(loss, Proof()), sums)
    sums.flush()
    torch.testing.assert_close(weight.grad, torch.ones_like(weight))


@takes_products
@pytest.mark.parametrize("kind", [a for a in ADAPTERS if "fused" in a.name], ids=lambda kind: kind.name)
def test_the_fused_adapters_fail_where_nothing_is_fused(kind, monkeypatch):
    monkeypatch.setattr("conformance.adapters.torch.small_ones_too", lambda: limits(cpu_elements=1 << 60))
    run = kind.start(jobs.Spec("net", jobs.params("net")))
    with pytest.raises(AssertionError, match=r"micro-batches were looked at|went past autograd"):
        run.window(jobs.window("net", (3, 3, 3, 3), seed=0))
