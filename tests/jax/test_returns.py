"""What `loss_fn` may return to the split API, and what is refused: a pair says by name what it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bigbatch.jax as bb

rng = np.random.default_rng(3)
W, X = jnp.asarray(rng.normal(size=4)), jnp.asarray(rng.normal(size=(10, 4)))
MASK = jnp.asarray([1.0, 0, 1, 1, 0, 1, 1, 0, 1, 1])


def losses(w, x):
    return jnp.tanh(x @ w) ** 2


def masked(w, x, mask):
    return (losses(w, x) * mask).sum() / mask.sum(), mask.sum()


AXES = (None, 0, 0)
RIGHT = jax.value_and_grad(lambda w: masked(w, X, MASK)[0])(W)


def close(got, right):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("micro_batch", [4, 10, "auto"])
def test_has_items(micro_batch):
    close(bb.value_and_grad(masked, has_items=True, micro_batch=micro_batch, in_axes=AXES)(W, X, MASK), RIGHT)


def test_has_items_and_has_aux():
    def loss_fn(w, x, mask):
        return masked(w, x, mask), x.sum()

    options = {"has_aux": True, "has_items": True, "aux": "sum", "in_axes": AXES}
    (loss, total), grads = bb.value_and_grad(loss_fn, micro_batch=4, **options)(W, X, MASK)
    close((loss, grads, total), (*RIGHT, X.sum()))
    plan = bb.plan(loss_fn, **options)(W, X, MASK)
    assert plan.micro_batch == 10


def test_has_aux_alone_is_a_mean_over_examples():
    """An accuracy is no number of items, and changes no gradient."""

    def loss_fn(w, x, mask):
        return losses(w, x).mean(), mask.mean()

    options = {"micro_batch": 4, "has_aux": True, "aux": "mean", "in_axes": AXES}
    (loss, _), grads = bb.value_and_grad(loss_fn, **options)(W, X, MASK)
    close((loss, grads), jax.value_and_grad(lambda w: losses(w, X).mean())(W))


NAMES = r"has_items=True for \(loss, items\), has_aux=True for \(loss, aux\)"


@pytest.mark.parametrize("call", ["jit", "eager", "plan", "auto", "one micro-batch", "audit"])
@pytest.mark.parametrize("more", [(), (1.0, 2.0), (1.0, 2.0, 3.0)])
def test_a_tuple_without_a_name_is_refused(call, more):
    def loss_fn(w, batch):
        return losses(w, batch).mean(), *more

    function = bb.value_and_grad(loss_fn, micro_batch={"auto": "auto", "one micro-batch": 10}.get(call, 4))
    calls = {"plan": bb.plan(loss_fn), "audit": functools.partial(bb.audit, loss_fn, micro_batch=4),
             "jit": jax.jit(function)}  # fmt: skip
    words = rf"loss_fn must return the mean loss. Received: a tuple of {1 + len(more)}\. .*{NAMES}"
    with pytest.raises(TypeError, match=words):
        calls.get(call, function)(W, X)


@pytest.mark.parametrize("result", [0.0, (0.0,), (0.0, 1.0, 2.0), {"a": (0.0, 1)}, [0.0, 1.0]])
def test_has_items_wants_a_pair(result):
    result = jax.tree.map(jnp.asarray, result)
    words = r"With has_items, loss_fn must return \(loss, items\)\. Received: "
    with pytest.raises(TypeError, match=words):
        bb.value_and_grad(lambda w, x: result, has_items=True, micro_batch=4)(W, X)
    options = {"has_items": True, "has_aux": True, "aux": "mean"}
    with pytest.raises(TypeError, match=words):
        bb.value_and_grad(lambda w, x: (result, 1.0), micro_batch=4, **options)(W, X)


@pytest.mark.parametrize("use", [bb.plan, functools.partial(bb.value_and_grad, micro_batch=3),
                                 functools.partial(bb.value_and_grad, micro_batch="auto"),
                                 functools.partial(bb.value_and_grad, micro_batch=10)])  # fmt: skip
@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda w, x: losses(w, x), r"The loss must be a scalar of a floating type\. Received: loss=shape \(\d+,\)"),
        (lambda w, x: {}, "a dict without terms"),
        (lambda w, x: {"a": losses(w, x).mean()}, r"A loss term must be \(loss, items\)"),
        (lambda w, x: {"a": (losses(w, x), 1)}, "The loss must be a scalar"),
    ],
)
def test_losses_that_are_none(use, loss_fn, words):
    with pytest.raises(ValueError, match=words):
        use(loss_fn)(W, X)
