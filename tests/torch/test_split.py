"""The split door: batches as people nest them, `.grad` as `Tensor.backward` leaves it, errors without a trace."""

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bigbatch.torch as bb


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    y: torch.Tensor

    def __post_init__(self):
        if len(self.x) != 7:
            raise ValueError("a whole batch has seven")


class Encoding(collections.UserDict):
    """Like transformers' BatchEncoding."""


class Passes(TorchDispatchMode):
    """Counts the passes that multiply a list of gradients."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ == "_foreach_mul_"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


@pytest.fixture
def xy():
    torch.manual_seed(1)
    return torch.randn(7, 4).double(), torch.randn(7, 1).double()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def expected(model, loss):
    model.zero_grad()
    loss.backward()
    wanted = gradients(model)
    model.zero_grad()
    return wanted


def close(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("nest", "get"),
    [
        (lambda x, y: (x, y), lambda b: b),
        (lambda x, y: [x, y], lambda b: b),
        (lambda x, y: {"x": x, "more": {"y": (y, None)}}, lambda b: (b["x"], b["more"]["y"][0])),
        (Pair, lambda b: (b.x, b.y)),
        (Frozen, lambda b: (b.x, b.y)),
        (lambda x, y: Encoding(x=x, y=y), lambda b: (b["x"], b["y"])),
        (lambda x, y: collections.OrderedDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    ],
    ids=["tuple", "list", "nested", "namedtuple", "dataclass", "UserDict", "OrderedDict"],
)
def test_a_batch_is_any_nesting(model, xy, nest, get):
    wanted = expected(model, F.mse_loss(model(xy[0]), xy[1]))
    batch, seen = nest(*xy), []

    def loss_fn(part):
        seen.append(type(part))
        x, y = get(part)
        return F.mse_loss(model(x), y)

    loss = bb.backward(loss_fn, batch, micro_batch=3)
    assert seen == [type(batch)] * 3
    close(gradients(model), wanted)
    torch.testing.assert_close(loss, F.mse_loss(model(xy[0]), xy[1]).detach(), rtol=1e-14, atol=0)
    assert not loss.requires_grad


def test_it_adds_to_what_is_there_in_the_same_tensor(model, xy):
    wanted = expected(model, F.mse_loss(model(xy[0]), xy[1]))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.grad for p in model.parameters()]
    bb.backward(lambda b: F.mse_loss(model(b[0]), b[1]), xy, micro_batch=2)
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    close(gradients(model), [1 + w for w in wanted])


def test_a_micro_batch_larger_than_the_batch_is_one_micro_batch(model, xy):
    wanted = expected(model, F.mse_loss(model(xy[0]), xy[1]))
    bb.backward(lambda b: F.mse_loss(model(b[0]), b[1]), xy, micro_batch=100)
    assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_tokens(model, xy, as_tensor):
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1]).double()[:, None]

    def masked(x, y, m):
        return ((model(x) - y) ** 2 * m).sum() / m.sum()

    wanted = expected(model, masked(*xy, mask))

    def loss_fn(b):
        items = b[2].sum()
        return masked(*b), items if as_tensor else int(items)

    loss = bb.backward(loss_fn, (*xy, mask), micro_batch=3)
    close(gradients(model), wanted)
    torch.testing.assert_close(loss, masked(*xy, mask).detach())


def test_a_micro_batch_whose_items_are_all_masked_counts_for_nothing(model, xy):
    labels = torch.tensor([0, -100, 2, -100, -100, -100, 1])
    head = nn.Linear(1, 3).double()

    def loss_fn(b):
        return F.cross_entropy(head(model(b[0])), b[1], ignore_index=-100), (b[1] != -100).sum()

    wanted = expected(model, loss_fn((xy[0], labels))[0])
    loss = bb.backward(loss_fn, (xy[0], labels), micro_batch=2)  # the third micro-batch has no labels
    close(gradients(model), wanted)
    torch.testing.assert_close(loss, loss_fn((xy[0], labels))[0].detach())


@pytest.mark.parametrize(("micro_batch", "items", "passes"), [(2, None, 0), (4, None, 0), (2, 5, 0), (3, "own", 1)])
def test_equal_micro_batches_cost_no_pass_over_the_gradients(model, micro_batch, items, passes):
    x = torch.randn(8, 4).double()

    def loss_fn(b):
        loss = model(b).mean()
        return loss if items is None else (loss, len(b) if items == "own" else items)

    with Passes() as counted:
        bb.backward(loss_fn, x, micro_batch=micro_batch)
    assert counted.count == passes


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("at", [0, 2])
def test_an_error_in_the_forward_leaves_grad_as_it_was(model, xy, existing, at):
    if existing:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    calls = iter(range(9))

    def loss_fn(b):
        if next(calls) == at:
            raise RuntimeError("the third is bad")
        return F.mse_loss(model(b[0]), b[1])

    with pytest.raises(RuntimeError, match="the third is bad"):
        bb.backward(loss_fn, xy, micro_batch=2)
    for p in model.parameters():
        assert torch.equal(p.grad, torch.ones_like(p)) if existing else p.grad is None


def test_an_error_in_autograd_leaves_grad_as_it_was(model, xy):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("inside the backward")

    calls = iter(range(9))

    def loss_fn(b):
        hidden = model[:2](b[0])
        # The last layer's gradient is written before the error comes.
        return model[2](Fails.apply(hidden) if next(calls) == 1 else hidden).mean()

    with pytest.raises(RuntimeError, match="inside the backward"):
        bb.backward(loss_fn, xy, micro_batch=3)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_nan_is_refused_and_grad_is_as_it_was(model, xy):
    xy[0][5, 0] = float("nan")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"The loss is not a number. Received: loss=nan over 4 micro-batches"):
        bb.backward(lambda b: F.mse_loss(model(b[0]), b[1]), xy, micro_batch=2)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@pytest.mark.parametrize(
    ("loss_fn", "kind", "message"),
    [
        (
            lambda m, b: m(b),
            ValueError,
            r"The loss must be a scalar .* Received: loss=shape \(3, 1\), dtype torch.float64",
        ),
        (lambda m, b: m(b).sum().item(), ValueError, "The loss must be a scalar of a floating type. Received: loss="),
        (lambda m, b: m(b).detach().sum(), ValueError, "The loss needs no gradient"),
        (lambda m, b: (m(b).mean(), -2), ValueError, r"items must be positive. Received: items=-2 \(int\)"),
        (lambda m, b: (m(b).mean(), torch.ones(2)), TypeError, r"items must be a number. Received: items=shape \(2,\)"),
        (lambda m, b: (m(b).mean(), torch.tensor(True)), TypeError, "items must be a number"),
        (lambda m, b: (m(b).mean(), 2, 3), TypeError, r"loss_fn must return the mean loss or \(loss, items\)"),
    ],
    ids=["vector", "float", "detached", "items", "items tensor", "items bool", "triple"],
)
def test_bad_losses(model, xy, loss_fn, kind, message):
    with pytest.raises(kind, match=message):
        bb.backward(lambda b: loss_fn(model, b), xy[0], micro_batch=3)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": torch.ones(4, 2), "scale": 2.0}, r"must be an array .* Received: batch\['scale'\]=2.0 \(float\)"),
        ((torch.ones(4, 2), torch.tensor(1.0)), r"Received: batch\[1\]=shape \(\), dtype torch.float32 \(Tensor\)"),
        ({"x": torch.ones(2, 2), "ids": [7, 8]}, r"Received: batch\['ids'\]\[0\]=7 \(int\)"),
    ],
    ids=["number", "scalar tensor", "numbers"],
)
def test_a_leaf_that_cannot_be_cut_is_refused(batch, message):
    with pytest.raises(TypeError, match=message):
        bb.backward(lambda b: torch.ones(()), batch, micro_batch=2)


def test_a_batch_without_tensors_is_refused():
    with pytest.raises(ValueError, match="The batch holds no arrays"):
        bb.backward(lambda b: torch.ones(()), {"x": None}, micro_batch=2)


def test_checkpointed_blocks_are_exact_and_the_reentrant_kind_says_why_not(model, xy):
    wanted = expected(model, F.mse_loss(model(xy[0]), xy[1]))

    def loss_fn(reentrant):
        def fn(b):
            hidden = checkpoint(model[:2], b[0].requires_grad_(reentrant), use_reentrant=reentrant)
            return F.mse_loss(model[2](hidden), b[1])

        return fn

    bb.backward(loss_fn(False), xy, micro_batch=3)
    close(gradients(model), wanted)
    with pytest.raises(ValueError, match="Pass use_reentrant=False"):
        bb.backward(loss_fn(True), (xy[0].clone(), xy[1]), micro_batch=3)
    close(gradients(model), wanted)


def test_a_batch_that_wants_gradients_gets_them(model, xy):
    x = xy[0].requires_grad_()
    F.mse_loss(model(x), xy[1]).backward()
    wanted, x.grad = x.grad, None
    bb.backward(lambda b: F.mse_loss(model(b[0]), b[1]), (x, xy[1]), micro_batch=3)
    close([x.grad], [wanted])


def test_inside_no_grad_the_loss_is_refused(model, xy):
    with torch.no_grad(), pytest.raises(ValueError, match="The loss needs no gradient"):
        bb.backward(lambda b: model(b).mean(), xy[0], micro_batch=3)


@pytest.mark.parametrize("existing", [False, True])
def test_sparse_embeddings(existing):
    table = nn.Embedding(50, 3, sparse=True).double()
    ids = torch.tensor([1, 1, 4, 7, 1, 49, 4])
    share = torch.arange(1.0, 8).double()[:, None]

    def loss_fn(b):
        return (table(b[0]) * b[1]).mean(), len(b[0])

    rounds = 1 + existing
    for _ in range(rounds):
        loss_fn((ids, share))[0].backward()
    wanted, table.weight.grad = table.weight.grad.to_dense(), None
    for _ in range(rounds):
        bb.backward(loss_fn, (ids, share), micro_batch=2)
    assert table.weight.grad.is_sparse
    close([table.weight.grad.to_dense()], [wanted])


def test_half_precision_that_first_appears_in_a_later_micro_batch():
    wide, narrow = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(3.0, dtype=torch.bfloat16))

    def loss_fn(b):
        loss = wide * b.mean()
        return loss + (narrow.float() * b.mean() if b[0] > 1 else 0)

    bb.backward(loss_fn, torch.tensor([1.0, 1, 2, 2, 3, 3]), micro_batch=2)
    assert wide.grad.item() == 2.0
    assert narrow.grad == torch.tensor(5 / 3).bfloat16()


def test_half_precision_adds_to_what_is_there_with_one_rounding():
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    p.grad = torch.full((1,), 256.0, dtype=torch.bfloat16)
    bb.backward(lambda b: (p * b).float().mean(), torch.full((64,), 2.0, dtype=torch.bfloat16), micro_batch=1)
    assert p.grad.item() == 258.0


def test_float16_does_not_underflow():
    """A weight of 1/4096 on the loss would round these gradients to zero, in the parameters' own dtype."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    x = torch.full((4096, 1), 1e-6, dtype=torch.float16)
    bb.backward(lambda b: (p * b).mean(), x, micro_batch=1)
    torch.testing.assert_close(p.grad.float(), x[0].float(), rtol=1e-3, atol=0)


def test_accumulation_may_be_wider_than_asked_for_or_as_narrow():
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    x = torch.ones(512, 1, dtype=torch.bfloat16)
    bb.backward(lambda b: (p * b).mean(), x, micro_batch=1, dtype=None)
    assert p.grad.item() != 1.0  # what bf16 sums are like, for those who ask
    p.grad = None
    bb.backward(lambda b: (p * b).mean(), x, micro_batch=1, dtype=torch.float64)
    assert p.grad.item() == 1.0


def test_tied_and_frozen_parameters(xy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model(xy[0]).pow(2).mean().backward()
    wanted = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    bb.backward(lambda x: model(x).pow(2).mean(), xy[0], micro_batch=3)
    assert model[0].bias.grad is None
    close([p.grad for p in model.parameters() if p.requires_grad], [w for w in wanted if w is not None])


def test_a_compiled_model_is_exact_and_compiled_once(model, xy):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    wanted = expected(model, F.mse_loss(model(xy[0][:6]), xy[1][:6]))
    for _ in range(3):
        bb.backward(lambda b: F.mse_loss(compiled(b[0]), b[1]), (xy[0][:6], xy[1][:6]), micro_batch=2)
    close(gradients(model), [3 * w for w in wanted])
    assert len(graphs) == 1
