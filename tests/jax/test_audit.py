"""`audit` in JAX on losses whose truth is known."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bigbatch.jax as bb

ROOT = Path(__file__).parents[2]
rng = np.random.default_rng(0)
N, D, CLASSES = 14, 6, 4
PARAMS = {
    "a": jnp.asarray(rng.normal(size=(D, 8)) / 2),
    "b": jnp.zeros(8),
    "c": jnp.asarray(rng.normal(size=(8, CLASSES)) / 2),
}
X, Y = jnp.asarray(rng.normal(size=(N, D))), jnp.asarray(rng.integers(CLASSES, size=N))
IDS = jnp.asarray(rng.integers(D, size=(N, 6)))
MASK = jnp.arange(6) < rng.integers(1, 7, size=(N, 1))


def network(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def each(logits, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def tokens(params, batch):
    ids, mask = batch
    return each(jnp.tanh(params["a"][ids]) @ params["c"], ids % CLASSES), mask


def plain(params, batch):
    return each(network(params, batch[0]), batch[1]).mean()


def batch_norm(params, batch):
    hidden = batch[0] @ params["a"]
    hidden = (hidden - hidden.mean(0)) / hidden.std(0)
    return each(jnp.tanh(hidden + params["b"]) @ params["c"], batch[1]).mean()


def info_nce(params, batch):
    a = network(params, batch[0])
    return each(a @ jnp.roll(a, 1, axis=1).T, jnp.arange(len(a))).mean()


def token_mean(params, batch):
    losses, mask = tokens(params, batch)
    return (losses * mask).sum() / mask.sum()


def auxiliary(params, batch):
    return token_mean(params, batch) + jnp.square(params["a"][batch[0]].mean(1)).sum(1).mean()


ZOO = {
    "plain": (plain, (X, Y), True, []),
    "penalty": (lambda p, b: plain(p, b) + jnp.square(p["a"]).sum(), (X, Y), True, []),
    "tokens with items": (lambda p, b: (token_mean(p, b), b[1].sum()), (IDS, MASK), True, []),
    "terms by name": (
        lambda p, b: {
            "tokens": (token_mean(p, b), b[1].sum()),
            "examples": (jnp.square(p["a"][b[0]].mean(1)).sum(1).mean(), len(b[0])),
        },
        (IDS, MASK), True, [],
    ),
    "sum": (lambda p, b: each(network(p, b[0]), b[1]).sum(), (X, Y), False, ["sum"]),
    "constant": (lambda p, b: each(network(p, b[0]), b[1]).sum() / 64, (X, Y), False, ["sum"]),
    "tokens without items": (token_mean, (IDS, MASK), False, ["items"]),
    "two denominators": (lambda p, b: (auxiliary(p, b), b[1].sum()), (IDS, MASK), False, ["terms"]),
    "batch norm": (batch_norm, (X, Y), False, ["coupling"]),
    "info nce": (info_nce, (X, Y), False, ["coupling"]),
    "padding alone": (token_mean, (IDS, MASK.at[4:8].set(False)), False, ["not finite"]),
    "places": (
        lambda p, b: jnp.average(each(network(p, b[0]), b[1]), weights=jnp.linspace(1, 2, len(b[1]))),
        (X, Y), False, ["order"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name):
    loss_fn, batch, exact, causes = ZOO[name]
    has_items = name in ("tokens with items", "two denominators")
    found = bb.audit(loss_fn, PARAMS, batch, micro_batch=4, has_items=has_items)
    assert found.exact == exact, found
    assert [cause.kind for cause in found.causes] == causes, found
    assert found.dtype == "float64"


def test_dropout_with_a_key():
    def loss_fn(params, key, batch):
        keep = jax.random.bernoulli(key, 0.7, batch[0].shape)
        return each(network(params, jnp.where(keep, batch[0], 0)), batch[1]).mean()

    found = bb.audit(
        loss_fn, PARAMS, jax.random.key(0), (X, Y), micro_batch=4, in_axes=(None, None, 0)
    )  # fmt: skip
    assert (found.exact, [c.kind for c in found.causes]) == (True, ["stochastic"])
    assert found.verdict.endswith("apart from randomness")


def test_without_x64_it_is_made_in_float64_all_the_same():
    with jax.enable_x64(False):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
        found = bb.audit(plain, params, (X.astype(jnp.float32), Y), micro_batch=4)
        assert (found.dtype, found.exact) == ("float64", True)
        assert found.error < 1e-12
        assert jnp.zeros(()).dtype == jnp.float32


def test_a_loss_with_parts_in_float32():
    def loss_fn(params, batch):
        return plain(params, (batch[0].astype(jnp.float32).astype(batch[0].dtype), batch[1])) + (
            jnp.square(network(params, batch[0]).astype(jnp.float32)).mean()
        )

    found = bb.audit(loss_fn, PARAMS, (X, Y), micro_batch=4)
    assert (found.dtype, found.exact) == ("float64", True)
    assert 1e-9 < found.tolerance < 1e-4


def test_a_loss_that_cannot_compute_in_float64():
    def loss_fn(params, batch):
        if params["a"].dtype != jnp.float32:
            raise TypeError("a kernel of mine is for float32")
        return plain(params, batch)

    params = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
    found = bb.audit(loss_fn, params, (X.astype(jnp.float32), Y), micro_batch=4)
    assert (found.dtype, found.exact) == ("float32", True)


def test_has_aux_and_names():
    found = bb.audit(lambda p, b: (plain(p, b), {"extra": 1.0}), PARAMS, (X, Y), micro_batch=4, has_aux=True)
    assert found.exact
    assert [p.name for p in found.parameters] == ["['a']", "['b']", "['c']"]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"micro_batch": 0}, ValueError, "micro_batch must be at least 1"),
        ({"micro_batch": 14}, ValueError, "An audit needs more than one micro-batch"),
        ({"batch": (X, Y[:3])}, ValueError, "The leaves of a batch must have the same length"),
        ({"loss_fn": lambda p, b: p["a"]}, ValueError, "The loss must be a scalar of a floating type"),
        ({"loss_fn": lambda p, b: (plain(p, b), -1), "has_items": True}, ValueError, "items must be positive"),
        ({"loss_fn": lambda p, b: (plain(p, b), 4)}, TypeError, "loss_fn must return the mean loss"),
        ({"in_axes": 0}, TypeError, "in_axes must be a tuple"),
    ],
)
def test_bad_input(change, kind, words):
    given = {"loss_fn": plain, "batch": (X, Y), "micro_batch": 4, **change}
    with pytest.raises(kind, match=words):
        bb.audit(given.pop("loss_fn"), PARAMS, given.pop("batch"), **given)


def test_the_example(capsys):
    with jax.enable_x64(False):  # as JAX comes
        runpy.run_path(str(ROOT / "examples/jax_honest.py"))
    said = capsys.readouterr().out
    assert "not exact: " in said
    assert "\nexact to " in said
    assert "noise scale: " in said
    assert "windows of [" in said
