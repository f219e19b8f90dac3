"""The noise scale in the state of `accumulate`, under jit: the right numbers, nothing retraced, and self-closing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bigbatch.jax as bb
from bigbatch.noise import Noise

PARAMS = {"w": jnp.asarray([1.0, -2.0, 3.0]), "b": jnp.asarray(0.5)}
rng = np.random.default_rng(0)
GRADS = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), PARAMS) for _ in range(4)]
ITEMS = [3, 1, 4, 2]


def by_hand(grads=GRADS, items=ITEMS):
    flat = [np.concatenate([np.ravel(g) for g in jax.tree.leaves(grad)]) for grad in grads]
    held = [(g, n) for g, n in zip(flat, items, strict=True) if n]
    total = sum(n for _, n in held)
    mean = sum(n * g for g, n in held) / total
    return Noise.of(len(held), total, sum(n * float(g @ g) for g, n in held), float(mean @ mean))


def train(tx, grads=GRADS, items=ITEMS, state=None):
    step = jax.jit(tx.update)
    state = tx.init(PARAMS) if state is None else state
    seen = []
    for g, n in zip(grads, items, strict=True):
        _, state = step(g, state, PARAMS, items=n)
        if state.micro_batches == 0:
            seen.append(state.last)
    assert step._cache_size() == 1
    return state, seen


def close(noise, wanted):
    got = [float(x) for x in noise]
    assert got == pytest.approx([wanted.micro_batches, wanted.items, wanted.trace, wanted.squared_norm], rel=1e-12)


def test_a_window_says_what_every_gradient_by_itself_would():
    state, (last,) = train(bb.accumulate(optax.sgd(0.1), every=4, noise=1))
    close(last.noise, by_hand())
    running = bb.noise_scale(state)
    assert running.windows == 1
    assert running.trace == pytest.approx(by_hand().trace)


def test_a_micro_batch_without_items():
    grads = [*GRADS[:1], jax.tree.map(lambda g: g * jnp.nan, GRADS[1]), *GRADS[2:]]
    items = [jnp.asarray(n) for n in (3, 0, 4, 2)]
    _, (last,) = train(bb.accumulate(optax.sgd(0.1), every=4, noise=1), grads, items)
    close(last.noise, by_hand(items=[3, 0, 4, 2]))


def test_without_it_the_state_is_as_it_was():
    state = bb.accumulate(optax.sgd(0.1), every=4).init(PARAMS)
    assert state.noise is None
    assert state.last.noise is None
    with pytest.raises(ValueError, match=r"The state measures no noise\. Pass noise=True"):
        bb.noise_scale(state)


def test_the_updates_are_the_same_to_the_bit():
    results = []
    for noise in (False, 1, 2):
        tx = bb.accumulate(optax.adam(0.1), every=4, noise=noise)
        params, state, step = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
        for g, n in zip(GRADS * 3, ITEMS * 3, strict=True):
            updates, state = step(g, state, params, items=n)
            params = optax.apply_updates(params, updates)
        results.append(params)
    for other in results[1:]:
        assert jax.tree.all(jax.tree.map(np.array_equal, results[0], other))


def test_one_window_in_twenty():
    state, seen = train(bb.accumulate(optax.sgd(0.0), every=2, noise=True), GRADS * 11, ITEMS * 11)
    assert [k for k, last in enumerate(seen) if last.noise.micro_batches] == [0, 20]
    assert seen[1].noise.trace == -math.inf  # not measured
    assert bb.noise_scale(state).windows == 2


def test_in_a_chain():
    tx = optax.chain(optax.clip_by_global_norm(1e9), bb.accumulate(optax.sgd(0.1), every=4, noise=1))
    state = tx.init(PARAMS)
    for g, n in zip(GRADS, ITEMS, strict=True):
        _, state = tx.update(g, state, PARAMS, items=n)
    assert bb.noise_scale(state).trace == pytest.approx(by_hand().trace)


@pytest.mark.parametrize("partial", ["apply", "carry", "drop"])
def test_flush(partial):
    tx = bb.accumulate(optax.sgd(0.1), every=8, partial=partial, noise=1)
    state, _ = train(tx)
    _, state = jax.jit(functools.partial(bb.flush, tx))(state, PARAMS)
    if partial == "apply":
        close(state.last.noise, by_hand())
    else:
        assert state.last.noise.trace == -math.inf
    assert bb.noise_scale(state).windows == (partial == "apply")
    assert jax.tree.structure(bb.reset(state)) == jax.tree.structure(state)


@pytest.mark.parametrize("every", [4, bb.until_noise(at_most=4)], ids=str)
def test_a_window_of_nan_is_left_out(every):
    tx = bb.accumulate(optax.sgd(0.1), every=every, noise=1)
    state, (last,) = train(tx, [jax.tree.map(lambda g: g * jnp.nan, GRADS[0]), *GRADS[1:]])
    assert last.reason.startswith("the window is not finite")
    assert bb.noise_scale(state).windows == 0
    state, _ = train(tx, GRADS * 2, ITEMS * 2, state)
    assert bb.noise_scale(state).windows >= 1
    assert math.isfinite(bb.noise_scale(state).trace)


def test_zero_gradients_and_windows_of_one():
    zeros = [jax.tree.map(jnp.zeros_like, PARAMS)] * 4
    state, seen = train(bb.accumulate(optax.sgd(0.1), every=bb.until_noise(at_most=4)), zeros)
    assert [int(last.micro_batches) for last in seen] == [2, 2]
    assert str(bb.noise_scale(state)).startswith("none: the gradient is zero")
    state, _ = train(bb.accumulate(optax.sgd(0.1), every=1, noise=1))
    assert "no window held two micro-batches" in str(bb.noise_scale(state))


def signal(size, strength, noise, count, d=300):
    draws = np.random.default_rng(0)
    direction = np.full(d, d**-0.5)
    return {"w": strength * direction + noise * draws.normal(size=(count, d)) * (d * size) ** -0.5}


def closing(grads, **options):
    tx = bb.accumulate(optax.sgd(0.0), every=bb.until_noise(**options))
    params = {"w": jnp.zeros(300)}

    @jax.jit
    def run(grads):
        def step(state, g):
            _, state = tx.update(g, state, params, items=2)
            return state, (bb.has_updated(state), state.last)

        return jax.lax.scan(step, tx.init(params), grads)[1]

    updated, last = run(grads)
    last = jax.tree.map(np.asarray, last)
    return [jax.tree.map(lambda x, k=k: x[k].item(), last) for k in np.flatnonzero(updated)]


def test_windows_close_themselves_under_jit():
    assert [u.micro_batches for u in closing(signal(2, 1.0, 1e-6, 8), at_most=64)] == [2] * 4
    assert [u.micro_batches for u in closing(signal(2, 0.0, 1.0, 40), eta=0.2, at_most=20)] == [20] * 2
    updates = closing(signal(2, 1.0, 10.0, 2000), at_most=512)
    assert 60 < np.mean([u.items for u in updates]) < 120  # of 100
    assert all(u.micro_batches in bb.until_noise(at_most=512).looks for u in updates)
    assert all(u.noise.trace <= u.noise.squared_norm * u.items for u in updates)


@pytest.mark.parametrize("sizes", [[4] * 8, [1, 2, 3, 10, 4, 4, 6, 2]], ids=["equal", "ragged"])
def test_monte_carlo(sizes):
    d, windows = 200, 3000
    scales, gradient = jnp.linspace(0.5, 1.5, d), jnp.full(d, math.sqrt(10 / d))
    trace, squared_norm = float(jnp.square(scales).sum()), 10.0
    tx = bb.accumulate(optax.sgd(0.0), every=len(sizes), noise=1)
    params, items = jnp.zeros(d), jnp.asarray(sizes)

    @jax.jit
    def run(key):
        def step(state, k):
            n = items[k % len(sizes)]
            x = gradient + scales * jax.random.normal(jax.random.fold_in(key, k), (max(sizes), d))
            grads = jax.grad(lambda w: (x @ w).mean(where=jnp.arange(max(sizes)) < n))(params)
            _, state = tx.update(grads, state, params, items=n)
            return state, state.last.noise

        return jax.lax.scan(step, tx.init(params), jnp.arange(windows * len(sizes)))

    state, seen = run(jax.random.key(0))
    closed = slice(len(sizes) - 1, None, len(sizes))
    assert abs(float(seen.trace[closed].mean()) / trace - 1) < 0.01
    assert abs(float(seen.squared_norm[closed].mean()) / squared_norm - 1) < 0.01
    assert bb.noise_scale(state).scale == pytest.approx(trace / squared_norm, rel=0.3)  # of the last 40 windows


@pytest.mark.parametrize("noise", [True, 20])
def test_noise_beside_until_noise_is_refused(noise):
    with pytest.raises(ValueError, match=r"noise has no effect with every=until_noise.*Received: noise="):
        bb.accumulate(optax.sgd(0.1), every=bb.until_noise(at_most=4), noise=noise)
