"""`cut=` and `length=`: batches in which rows belong together, as DPO's chosen and rejected answers do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb

PAIRS = 6
X = torch.randn(2 * PAIRS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def dpo(model):
    """The chosen rows come first, then the rejected ones."""

    def loss_fn(batch):
        chosen, rejected = model(batch["x"]).squeeze(1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    return loss_fn


def pairs(batch, indices):
    return {"x": batch["x"][torch.cat([indices, indices + PAIRS])]}


def distance(model, wanted):
    got, expected = (torch.cat([g.flatten() for g in some]) for some in ([p.grad for p in model.parameters()], wanted))
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("micro_batch", [1, 4, 6, 7])
def test_pairs_stay_together(micro_batch):
    model, seen = net(), []
    loss_fn, batch = dpo(model), {"x": X}

    def cut(batch, indices):
        seen.append(indices.tolist())
        assert (indices.dtype, indices.device.type) == (torch.int64, "cpu")
        return pairs(batch, indices)

    whole = loss_fn(batch)
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    loss = bb.backward(loss_fn, batch, micro_batch=micro_batch, cut=cut, length=PAIRS)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-13)
    assert distance(model, wanted) < 1e-13
    assert [i for part in seen for i in part] == list(range(PAIRS))
    assert all(len(part) <= micro_batch for part in seen)


def test_a_batch_of_any_kind_may_be_cut():
    """Neither tensors nor a leading dimension are needed: here are two lists, transposed."""
    model = net()
    wanted = torch.autograd.grad(model(X).square().mean(), list(model.parameters()))
    columns = [list(column) for column in X.T]

    def cut(batch, indices):
        return torch.stack([torch.stack([column[i] for column in batch]) for i in indices.tolist()])

    bb.backward(lambda x: model(x).square().mean(), columns, micro_batch=5, cut=cut, length=len(X))
    assert distance(model, wanted) < 1e-13


def test_the_audit_names_rows_that_belong_together():
    model = net()
    found = bb.audit(dpo(model), model, {"x": X}, micro_batch=4)
    assert not found.exact
    assert [cause.kind for cause in found.causes] == ["coupling"]
    assert f"rows i and i + {PAIRS} in the same micro-batch" in str(found)
    assert bb.audit(dpo(model), model, {"x": X}, micro_batch=2, cut=pairs, length=PAIRS).exact


def test_the_audit_names_neighbours_too():
    model = net()

    def loss_fn(x):
        one, other = model(x).squeeze(1).unflatten(0, (-1, 2)).unbind(1)
        return -F.logsigmoid(one - other).mean()

    def uneven(x):
        return loss_fn(x if len(x) % 2 == 0 else x[:-1]) if len(x) > 1 else model(x).mean()

    found = bb.audit(uneven, model, X, micro_batch=3)
    assert "rows 2i and 2i + 1 in the same micro-batch" in str(found)


@pytest.mark.parametrize(
    "loss_fn",
    [lambda z: z.square().mean() ** 2, lambda z: (z - z.mean()).square().mean(), lambda z: z.square().sum()],
    ids=["a square of a mean", "centred", "a sum"],
)
def test_other_losses_are_not_said_to_hold_pairs(loss_fn):
    model = net()
    assert "belong together" not in str(bb.audit(lambda x: loss_fn(model(x)), model, X, micro_batch=4))


REFUSED = {
    "cut alone": ({"cut": pairs}, ValueError, "cut without length"),
    "length alone": ({"length": PAIRS}, ValueError, "length without cut"),
    "no function": ({"cut": 3, "length": PAIRS}, TypeError, "cut must be a function"),
    "no examples": ({"cut": pairs, "length": 0}, ValueError, "length must be at least 1"),
    "half an example": ({"cut": pairs, "length": 2.5}, TypeError, "length must be an integer"),
    "auto": ({"cut": pairs, "length": PAIRS, "micro_batch": "auto"}, ValueError, "Pass a number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_the_gradients(name):
    options, kind, text = REFUSED[name]
    model = net()
    with pytest.raises(kind, match=text):
        bb.backward(dpo(model), {"x": X}, **{"micro_batch": 2, **options})
    assert all(p.grad is None for p in model.parameters())


def test_an_error_inside_of_cut_leaves_the_gradients():
    model = net()

    def broken(batch, indices):
        if indices[0] > 2:
            raise OSError("broken")
        return pairs(batch, indices)

    with pytest.raises(OSError, match="broken"):
        bb.backward(dpo(model), {"x": X}, micro_batch=2, cut=broken, length=PAIRS)
    assert all(p.grad is None for p in model.parameters())
