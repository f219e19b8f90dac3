"""Items that are none, and numbers that there are none of: refused, or skipped with the reason; never counted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bigbatch.jax as bb
from conformance.adapters.jax import Counts

rng = np.random.default_rng(5)
PARAMS = {"w": jnp.asarray(rng.normal(size=4)), "b": jnp.asarray(0.25)}
GRADS = [{"w": jnp.asarray(rng.normal(size=4)), "b": jnp.asarray(rng.normal())} for _ in range(4)]
BAD = [-1.0, -np.inf, np.inf, np.nan]
REASON = "a micro-batch's items are negative, NaN or infinite"


def step(tx):
    def one(params, state, grads, items, value):
        return bb.apply_gradients(tx, grads, state, params, items=items, value=value)

    return jax.jit(one)


def close(got, right):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("bad", "place"), [*itertools.product(BAD, range(3))])
@pytest.mark.parametrize("every", [3, bb.items(6), lambda k: 3, lambda k: jnp.where(k >= 0, 3, 1)])
def test_in_a_traced_window(bad, place, every):
    tx = bb.accumulate(optax.adam(0.1), every=every)
    run, params, state = step(tx), PARAMS, tx.init(PARAMS)
    items = [2.0, 2.0, 2.0]
    items[place] = bad
    for k in range(3):
        params, state = run(params, state, GRADS[k], jnp.asarray(items[k]), jnp.asarray(1.0))
        if state.micro_batches == 0:  # a window of so many items cannot know how many it holds, and closes
            break
    assert state.last.reason == REASON
    assert not bb.has_updated(state)
    close(params, PARAMS)
    assert state.updates == 0
    for k in range(3):
        params, state = run(params, state, GRADS[k], jnp.asarray(2.0), jnp.asarray(1.0))
    assert bb.has_updated(state)
    mean = jax.tree.map(lambda *g: sum(g) / 3, *GRADS[:3])
    close(params, optax.apply_updates(PARAMS, optax.adam(0.1).update(mean, optax.adam(0.1).init(PARAMS))[0]))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", [np.asarray, np.float32, jnp.asarray])
def test_what_can_be_read_is_refused_before_anything_moves(bad, kind):
    tx = bb.accumulate(optax.adam(0.1), every=3)
    state = tx.init(PARAMS)
    items = jax.block_until_ready(kind(bad))
    with pytest.raises(ValueError, match=r"items must be (positive|finite)\. Received: items="):
        tx.update(GRADS[0], state, PARAMS, items=items)
    if kind is np.asarray:
        with pytest.raises(ValueError, match=r"items must be (positive|finite)\. Received: items="):
            jax.jit(lambda s: tx.update(GRADS[0], s, PARAMS, items=items))(state)


def test_zero_in_an_array_counts_for_nothing():
    for zero in (np.zeros(()), jnp.zeros(()), np.asarray(-0.0), np.zeros((), np.int32)):
        tx = bb.accumulate(optax.sgd(0.1), every=2)
        _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, items=zero)
        updates, state = tx.update(GRADS[1], state, PARAMS, items=2)
        close(updates, jax.tree.map(lambda g: -0.1 * g, GRADS[1]))


def test_a_flush_says_so_too():
    tx = bb.accumulate(optax.sgd(0.1), every=3)
    params, state = step(tx)(PARAMS, tx.init(PARAMS), GRADS[0], jnp.asarray(-2.0), jnp.asarray(1.0))
    updates, state = bb.flush(tx, state, params)
    assert state.last.reason == REASON
    assert not any(map(np.any, jax.tree.leaves(updates)))


def test_nobody_waits_for_them():
    tx = bb.accumulate(optax.sgd(0.1), every=3)
    run, params, state = step(tx), PARAMS, tx.init(PARAMS)
    items = jnp.asarray(2.0)
    params, state = run(params, state, GRADS[0], items, items)
    with Counts() as counts:
        for k in range(8):
            params, state = run(params, state, GRADS[k % 4], items, items)
    assert (counts.compiled, counts.waits) == (0, 0)


class TestSplit:
    x = jnp.asarray(rng.normal(size=(8, 4)))

    def loss_fn(self, w, x, items):
        return jnp.tanh(x @ w).mean(), items.sum()

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("micro_batch", [3, 4, 8])
    def test_unseen_items_make_nan(self, bad, micro_batch):
        """Not a number, as for a window without items: a compiled function has no other way to say so."""
        items = jnp.ones(8).at[2].set(40 * bad)
        found = bb.value_and_grad(self.loss_fn, has_items=True, micro_batch=micro_batch, in_axes=(None, 0, 0))
        loss, grads = jax.jit(found)(PARAMS["w"], self.x, items)
        assert np.isnan(loss)
        assert np.isnan(grads).all()

    @pytest.mark.parametrize("bad", BAD)
    @pytest.mark.parametrize("micro_batch", [3, 4, 8])
    def test_in_terms(self, bad, micro_batch):
        items = jnp.ones(8).at[2].set(40 * bad)

        def terms(w, x, items):
            return {"bad": self.loss_fn(w, x, items), "good": (jnp.square(x @ w).mean(), len(x))}

        found = bb.value_and_grad(terms, micro_batch=micro_batch, in_axes=(None, 0, 0))
        losses, grads = jax.jit(found)(PARAMS["w"], self.x, items)
        assert np.isnan(losses["bad"])
        assert np.isnan(grads).all()

    @pytest.mark.parametrize("bad", BAD)
    def test_numbers_are_refused(self, bad):
        for items in (bad, np.asarray(bad)):
            found = bb.value_and_grad(lambda w, x, n=items: ((x @ w).mean(), n), has_items=True, micro_batch=4)
            with pytest.raises(ValueError, match=r"items must be (positive|finite)"):
                jax.jit(found)(PARAMS["w"], self.x)


class TestDebugNans:
    """`jax_debug_nans` looks for NaN in every result: there is none of ours."""

    @pytest.fixture(autouse=True)
    def _debug(self):
        with jax.debug_nans(True):
            yield

    # Each option once, and each pair of an `every` and a kind of noise; compiling takes seconds.
    @pytest.mark.parametrize(
        ("every", "noise", "jit", "valued"),
        [
            (2, False, True, False),
            (2, 1, True, True),
            (2, 3, False, True),
            (bb.items(4), True, True, False),
            (bb.until_noise(at_most=4), False, False, False),
            (bb.until_noise(at_most=4), False, True, True),
            (1, 1, False, True),
        ],
    )
    def test_the_stream_api(self, every, noise, jit, valued):
        tx = bb.accumulate(optax.adam(0.1), every=every, noise=noise)
        step = jax.jit(tx.update) if jit else tx.update
        flush = jax.jit(lambda s: bb.flush(tx, s, PARAMS)) if jit else lambda s: bb.flush(tx, s, PARAMS)
        state = tx.init(PARAMS)
        value = {"value": jnp.asarray(1.5)} if valued else {}
        for k in range(5):
            _, state = step(GRADS[k % 4], state, PARAMS, items=jnp.asarray(2.0), **value)
        _, state = flush(state)
        _, state = flush(state)  # of nothing
        state = bb.reset(state)
        _, state = step(GRADS[0], state, PARAMS, items=jnp.asarray(0.0), **value)
        _, state = flush(state)
        assert state.last.reason in ("the window holds no items", "the window holds no micro-batches")

    @pytest.mark.parametrize("partial", ["carry", "drop"])
    def test_partial_windows(self, partial):
        tx = bb.accumulate(optax.adam(0.1), every=4, partial=partial)
        _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, items=2)
        _, state = bb.flush(tx, state, PARAMS)
        assert state.last.reason.startswith("carried" if partial == "carry" else "dropped")

    @pytest.mark.parametrize("jit", [True, False])
    @pytest.mark.parametrize("micro_batch", [3, 4, 8])
    def test_the_split_api(self, jit, micro_batch):
        def masked(w, x, mask):
            return (jnp.tanh(x @ w) * mask).sum() / jnp.maximum(mask.sum(), 1), mask.sum()

        mask = jnp.asarray([1, 0, 1, 1, 1, 0, 1, 1.0]).at[jnp.asarray([1, 5])].set(0)
        one = bb.value_and_grad(masked, has_items=True, micro_batch=micro_batch, in_axes=(None, 0, 0))
        terms = bb.value_and_grad(lambda *a: {"a": masked(*a)}, micro_batch=micro_batch, in_axes=(None, 0, 0))
        for found in (one, terms):
            jax.block_until_ready((jax.jit(found) if jit else found)(PARAMS["w"], TestSplit.x, mask))

    def test_a_nan_of_the_users_is_found(self):
        tx = bb.accumulate(optax.sgd(0.1), every=1)
        bad = jax.tree.map(lambda g: np.asarray(g) * np.nan, GRADS[0])
        with pytest.raises(FloatingPointError):
            jax.jit(tx.update)(bad, tx.init(PARAMS), PARAMS, items=1)


def test_a_window_whose_loss_is_not_finite_makes_no_update():
    """The mean loss reaches the transformation: polyak_sgd would divide it by the gradient and be NaN for good."""
    tx = bb.accumulate(optax.polyak_sgd(1.0), every=2)
    run, state = step(tx), tx.init(PARAMS)
    for value in (1.0, np.nan):
        params, state = run(PARAMS, state, GRADS[0], 2.0, jnp.asarray(value))
    assert state.last.reason.startswith("the window is not finite: loss nan")
    close(params, PARAMS)


def test_no_loss_given_is_no_number():
    tx = bb.accumulate(optax.sgd(0.1), every=1)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, items=2)
    assert state.last.loss == -np.inf
    assert bb.has_updated(state)
    assert tx.init(PARAMS).last.loss == -np.inf


VALUES = [jnp.ones(3), np.ones((1,)), "1.0", jnp.asarray(True), jnp.asarray(1j), [1.0]]


@pytest.mark.parametrize("value", VALUES)
def test_value_is_one_real_number(value):
    tx = bb.accumulate(optax.sgd(0.1), every=2)
    state = tx.init(PARAMS)
    for update in (tx.update, lambda g, s, p, **kw: bb.apply_gradients(tx, g, s, p, **kw)):
        with pytest.raises(ValueError, match=r"value must be a scalar, the micro-batch's mean loss\. Received: value="):
            update(GRADS[0], state, PARAMS, items=3, value=value)
    for good in (2, 2.0, np.float32(2), np.asarray(2), jnp.asarray(2.0, jnp.bfloat16)):
        _, later = tx.update(GRADS[0], state, PARAMS, items=3, value=good)
        assert later.loss == 2


@pytest.mark.parametrize("number", [0, -3])
def test_a_schedule_of_windows_that_says_less_than_one(number):
    concrete = bb.accumulate(optax.sgd(0.1), every=lambda k: jnp.asarray(number))
    with pytest.raises(ValueError, match="every must be at least 1"):
        concrete.update(GRADS[0], concrete.init(PARAMS), PARAMS, items=2)
    traced = bb.accumulate(optax.sgd(0.1), every=lambda k: jnp.where(k == 0, number, 2))
    params, state = step(traced)(PARAMS, traced.init(PARAMS), GRADS[0], 2.0, 1.0)
    assert state.last.reason == "every returned a number below 1; it must be at least 1"
    close(params, PARAMS)
