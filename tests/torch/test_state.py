"""States that are damaged or of something else: a ValueError that names the entry, and the open window goes on."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigbatch.torch as bb
from conformance.torch_products import small_ones_too

SIZES = (5, 1, 4, 2)


class Tables(nn.Module):
    """A sparse gradient, a matrix whose products may be deferred, and a small vector."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 24, sparse=True, dtype=dtype)
        self.linear = nn.Linear(24, 24, dtype=dtype)

    def forward(self, ids):
        return self.linear(self.table(ids)).tanh().sum(1)


def ids():
    return (torch.arange(12) * 5 % 9).split(SIZES)


def feed(acc, model, parts):
    for part in parts:
        acc.backward(model(part).double().square().mean(), items=torch.tensor(len(part)))


KINDS = {
    "in .grad": {"dtype": torch.float64},
    "wide": {"dtype": torch.bfloat16},
    "fused": {"dtype": torch.float64, "fused": True},
    "measured": {"dtype": torch.float64, "noise": 1},
}


def started(kind):
    options = {"fused": False, **KINDS[kind]}
    model = Tables(options.pop("dtype"))
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=0.5), every=4, **options)
    return model, acc


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, expected):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))


def entries(nest, path=()):
    """Every place in a state, with what stands there."""
    yield path, nest
    if isinstance(nest, dict):
        for key, value in nest.items():
            yield from entries(value, (*path, key))
    elif isinstance(nest, list | tuple):
        for i, value in enumerate(nest):
            yield from entries(value, (*path, i))


MISSING = object()


def replaced(nest, path, value):
    """A copy with something else at one place."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(nest, dict):
        copied = {k: replaced(v, rest, value) if k == key else v for k, v in nest.items()}
        if not rest and value is MISSING:
            del copied[key]
        return copied
    copied = [replaced(v, rest, value) if i == key else v for i, v in enumerate(nest)]
    if not rest and value is MISSING:
        del copied[key]
    return copied if isinstance(nest, list) else tuple(copied)


def mutations(value):
    """What may stand at a place after damage: another type, shape, dtype, sign, or nothing at all."""
    yield from (MISSING, None, "text", [], {}, (), True, -1, -2.5, 0.5, math.nan, math.inf, 10**9, torch.ones(3))
    yield from (torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor([[1j]]), {"a": 1}, [1, 2], object())
    if isinstance(value, torch.Tensor):
        yield value.to(torch.float16)
        yield value.to(torch.complex64)
        yield value.to_dense()[None] if value.is_sparse else value[None]
        if value.ndim and not value.is_sparse:
            yield value[:-1]
        if value.ndim > 1 and not value.is_sparse:
            yield value.reshape(-1)
    if isinstance(value, dict):
        yield {**value, "extra": 1}
        yield {**value, 10**6: torch.ones(())}
        yield list(value.items())
    if isinstance(value, int | float):
        yield float(value) + 0.25
        yield str(value)


def is_undetectable(path, value, new):
    """A damage that leaves a state of something else that is one all the same."""
    free = {"micro_batches", "repeats", "items", "unit", "index", "windows", "decay", "moments", "squares", "counted"}
    if free & set(path):
        return isinstance(new, int | float | torch.Tensor) and not isinstance(new, bool)  # another number, as good
    if path == ("window", "loss"):
        return isinstance(new, torch.Tensor)
    if path in (("noise",), ("pending",)):
        return new is MISSING  # as older states have none
    return path == ("noise", "window") and new is None  # where it was not measured


@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_damaged_in_every_way(kind):
    """ValueError and the window as it was, or a state that is accepted whole and closes its window."""
    with small_ones_too():
        model, acc = started(kind)
        feed(acc, model, ids()[:2])
        state = copy.deepcopy(acc.state_dict())
        assert bool(state["window"]["waiting"]) == (kind == "fused")
        start = weights(model)
        feed(acc, model, ids()[2:])
        undisturbed = weights(model)
        refused = accepted = 0
        unnamed = []
        model, acc = started(kind)
        feed(acc, model, ids()[:2])
        for path, value in list(entries(state)):
            for new in mutations(value):
                damaged = replaced(state, path, new)
                if damaged is MISSING or (isinstance(new, dict | list) and not new and new == value):
                    continue
                try:
                    acc.load_state_dict(damaged)
                except ValueError as error:
                    refused += 1
                    if path and not any(str(name) in str(error) for name in path):
                        unnamed.append((path, new, str(error)))
                else:
                    accepted += 1
                    assert is_undetectable(path, value, new), (path, value, new)
                    acc.load_state_dict(copy.deepcopy(state))
                assert (acc.pending, acc.index) == (2, 0)
                assert same(model, start)
        assert not unnamed
        assert refused > 300
        assert accepted < refused / 2
        # After all that the window is still the one of the first two micro-batches.
        feed(acc, model, ids()[2:])
        assert same(model, undisturbed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_leaves_the_very_window(kind):
    """Refused states only, and no other load between: the window goes on to the bit."""
    with small_ones_too():
        model, acc = started(kind)
        feed(acc, model, ids()[:2])
        state = copy.deepcopy(acc.state_dict())
        for path, new in (
            (("index",), -1),
            (("window", "unit"), 0),
            (("window", "gradients"), {99: torch.ones(1)}),
            (("window", "loss"), "text"),
            (("shapes",), None),
            (("noise", "scale", "moments"), [math.nan] * 7),
            (("window", "waiting"), {2: (torch.ones(2, 3), torch.ones(2, 24))}),
        ):
            with pytest.raises(ValueError, match=str(path[-1])):
                acc.load_state_dict(replaced(state, path, new))
        feed(acc, model, ids()[2:])
        twin, other = started(kind)
        feed(other, twin, ids())
        assert same(model, weights(twin))


@pytest.mark.parametrize("state", [None, [], "text", 3, {}, {"index": 0}, {1: 2, "a": 3}], ids=repr)
def test_what_is_no_state_at_all(state):
    model, acc = started("in .grad")
    feed(acc, model, ids()[:2])
    with pytest.raises(ValueError, match="The state is not an Accumulator's"):
        acc.load_state_dict(state)
    assert acc.pending == 2


def test_a_state_that_an_every_refuses_is_refused_before_the_window_goes():
    model, acc = started("in .grad")
    feed(acc, model, ids()[:2])
    state = copy.deepcopy(acc.state_dict())
    state["index"] = 5
    other = bb.Accumulator(
        torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), every=lambda index: 4 if index < 5 else 0
    )
    fresh, acc = started("in .grad")
    acc.every = other.every
    feed(acc, fresh, ids()[:2])
    with pytest.raises(ValueError, match="every"):
        acc.load_state_dict(state)
    assert (acc.pending, acc.index) == (2, 0)


def test_deferred_rows_load_where_none_are_deferred():
    """Saved by a fused Accumulator, loaded with fused=False: the rows are multiplied out."""
    with small_ones_too():
        model, acc = started("fused")
        feed(acc, model, ids()[:2])
        file = io.BytesIO()
        torch.save(acc.state_dict(), file)
        feed(acc, model, ids()[2:])
        file.seek(0)
        twin, plain = started("in .grad")
        plain.load_state_dict(torch.load(file, weights_only=True))
        feed(plain, twin, ids()[2:])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-13)


def test_a_state_of_another_dtype_is_refused():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    acc = bb.Accumulator(torch.optim.SGD(model.parameters(), lr=1.0), every=4)
    acc.backward(F.mse_loss(model(torch.ones(1, 3)), torch.ones(1, 2)), items=1)
    other = bb.Accumulator(torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=1.0), every=4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"state\['window'\]\['gradients'\]\[[01]\] must be .* dtype torch.float64"):
        other.load_state_dict(acc.state_dict())
