"""What only JAX's stream door has: optax around it and in it, traced windows, its state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bigbatch.jax as bb
from conformance.adapters.jax import Counts

PARAMS = {"w": jnp.asarray([1.0, -2.0, 3.0]), "b": jnp.asarray(0.5)}
rng = np.random.default_rng(0)
GRADS = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), PARAMS) for _ in range(8)]
ITEMS = [3, 1, 4, 2, 5, 1, 2, 6]


def mean(grads, items):
    total = sum(items)
    return jax.tree.map(lambda *gs: sum(n * g for n, g in zip(items, gs, strict=True)) / total, *grads)


def train(tx, params=PARAMS, grads=GRADS, items=ITEMS, **extra):
    step = jax.jit(tx.update)
    state = tx.init(params)
    for g, n in zip(grads, items, strict=True):
        updates, state = step(g, state, params, items=n, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def bare(tx, windows, params=PARAMS):
    state = tx.init(params)
    for grads, items in windows:
        updates, state = tx.update(mean(grads, items), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def close(got, wanted, tolerance=1e-13):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def equal(got, wanted):
    return jax.tree.all(jax.tree.map(functools.partial(np.array_equal, equal_nan=True), got, wanted))


HALVES = [(GRADS[:4], ITEMS[:4]), (GRADS[4:], ITEMS[4:])]


@pytest.mark.parametrize("every", [4, np.int32(4), lambda k: 4, lambda k: jnp.where(k < 1, 4, 4), bb.items(8)])
def test_when_windows_close(every):
    params, state = train(bb.accumulate(optax.adamw(0.1), every))
    windows = HALVES if not isinstance(every, type(bb.items(8))) else [(GRADS[:3], ITEMS[:3]), (GRADS[3:6], ITEMS[3:6]),
                                                                     (GRADS[6:], ITEMS[6:])]  # fmt: skip
    wanted, inner = bare(optax.adamw(0.1), windows)
    close(params, wanted)
    close(state.inner, inner)
    assert state.updates == len(windows)


def test_a_batch_that_grows():
    params, state = train(bb.accumulate(optax.sgd(0.1), lambda k: jnp.where(k == 0, 2, 6)))
    close(params, bare(optax.sgd(0.1), [(GRADS[:2], ITEMS[:2]), (GRADS[2:], ITEMS[2:])])[0])
    assert bb.has_updated(state)


def test_under_scan():
    tx = bb.accumulate(optax.adam(0.1), 4)

    def step(carry, batch):
        params, state = carry
        grads, items = batch
        updates, state = tx.update(grads, state, params, items=items)
        return (optax.apply_updates(params, updates), state), bb.has_updated(state)

    batches = jax.tree.map(lambda *gs: jnp.stack(gs), *GRADS), jnp.asarray(ITEMS)
    (params, _), updated = jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), batches))()
    close(params, bare(optax.adam(0.1), HALVES)[0])
    assert updated.tolist() == [False, False, False, True] * 2


def test_inside_chain_and_partition_and_inject_hyperparams():
    chained = optax.chain(optax.identity(), bb.accumulate(optax.adam(0.1), 4))
    params, state = train(chained)
    close(params, bare(optax.adam(0.1), HALVES)[0])
    assert bb.has_updated(optax.tree.get(state, "AccumulateState"))

    labels = {"w": "adam", "b": "sgd"}
    parts = {"adam": bb.accumulate(optax.adam(0.1), 4), "sgd": bb.accumulate(optax.sgd(0.1), 2)}
    params, _ = train(optax.partition(parts, labels))
    close(params["w"], bare(optax.adam(0.1), HALVES)[0]["w"])
    close(params["b"], bare(optax.sgd(0.1), [(GRADS[i : i + 2], ITEMS[i : i + 2]) for i in range(0, 8, 2)])[0]["b"])

    def make(rate):
        return bb.accumulate(optax.sgd(rate), 4)

    params, state = train(optax.inject_hyperparams(make)(rate=0.1))
    close(params, bare(optax.sgd(0.1), HALVES)[0], 1e-7)  # optax holds an injected rate in float32


def test_a_schedule_inside_counts_updates():
    def rate(count):
        return 1.0 / (1 + count)

    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
    params, state = train(bb.accumulate(inner, 4))
    close(params, bare(inner, HALVES)[0])
    assert state.inner.count == 2


def test_the_transformation_runs_once_a_window():
    calls = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append(1))
        return updates, state

    train(bb.accumulate(optax.GradientTransformation(lambda p: optax.EmptyState(), update), 4))
    jax.effects_barrier()
    assert len(calls) == 2


def test_extra_arguments_reach_it_and_value_is_the_windows_mean():
    def update(updates, state, params=None, *, value, scale, **extra):
        return jax.tree.map(lambda u: scale * u, updates), {"value": value, "items": extra["items"]}

    inner = optax.GradientTransformationExtraArgs(lambda p: {"value": jnp.zeros(()), "items": jnp.zeros(())}, update)
    tx = bb.accumulate(inner, 3)
    state = tx.init(PARAMS)
    step = jax.jit(tx.update)
    for g, n, value in zip(GRADS[:3], (1, 2, 5), (8.0, 1.0, 2.0), strict=True):
        updates, state = step(g, state, PARAMS, items=n, value=value, scale=-2.0)
    close(updates, jax.tree.map(lambda g: -2 * g, mean(GRADS[:3], (1, 2, 5))))
    assert state.inner == {"value": 2.5, "items": 8}
    assert state.last.loss == 2.5


def test_reduce_on_plateau_sees_the_windows_loss():
    inner = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=1, factor=0.5, accumulation_size=1))
    tx = bb.accumulate(inner, 2)
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    for loss in (1.0, 3.0, 3.0, 1.0, 0.5, 3.5):  # the window's mean never falls: 2, 2, 2
        _, state = step(GRADS[0], state, PARAMS, items=1, value=loss)
    assert optax.tree.get(state, "scale") == 0.25  # the last losses, 3, 1 and 3.5, would have given 0.5


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("every", [1, 2])
def test_a_poisoned_window_leaves_no_trace(poison, every):
    tx = bb.accumulate(optax.adam(0.1), every)
    bad = jax.tree.map(lambda g: g.at[...].set(poison), GRADS[0])
    state = tx.init(PARAMS)
    start, clean = state, state
    step = jax.jit(tx.update)
    for _ in range(every):
        updates, state = step(bad, state, PARAMS, items=1)
    assert not bb.has_updated(state)
    assert state.last.reason.startswith("the window is not finite")
    assert all((u == 0).all() for u in jax.tree.leaves(updates))
    assert equal(state._replace(last=None, grads=None), start._replace(last=None, grads=None))
    for g in GRADS[: 2 * every]:
        _, state = step(g, state, PARAMS, items=1)
        _, clean = step(g, clean, PARAMS, items=1)
    assert equal(state, clean)
    assert state.updates == 2


class TestFlush:
    def flushed(self, partial, count=2, **options):
        tx = bb.accumulate(optax.sgd(0.1), 4, partial=partial)
        params, state = train(tx, grads=GRADS[:count], items=ITEMS[:count])
        updates, state = jax.jit(functools.partial(bb.flush, tx))(state, params)
        return optax.apply_updates(params, updates), state

    def test_apply(self):
        params, state = self.flushed("apply")
        close(params, bare(optax.sgd(0.1), [(GRADS[:2], ITEMS[:2])])[0])
        assert bb.has_updated(state)
        assert state.last.reason is None
        assert (state.last.micro_batches, state.last.items, state.micro_batches) == (2, 4, 0)

    def test_carry(self):
        params, state = self.flushed("carry")
        close(params, PARAMS)
        assert state.last.reason == "carried: 2 micro-batches stay in the open window"
        assert state.micro_batches == 2
        assert not bb.has_updated(state)

    def test_drop(self):
        params, state = self.flushed("drop")
        close(params, PARAMS)
        assert state.last.reason == "dropped: 2 micro-batches"
        assert (state.micro_batches, state.items) == (0, 0)

    @pytest.mark.parametrize("partial", ["apply", "carry", "drop"])
    def test_of_nothing(self, partial):
        for count in (0, 4):
            _, state = self.flushed(partial, count)
            assert state.last.reason == "the window holds no micro-batches"
            assert not bb.has_updated(state)
            assert state.updates == count / 4

    def test_through_a_chain(self):
        tx = optax.chain(optax.clip(10.0), bb.accumulate(optax.sgd(0.1), 4))
        params, state = train(tx, grads=GRADS[:2], items=ITEMS[:2])
        updates, state = bb.flush(tx, state, params)
        close(optax.apply_updates(params, updates), bare(optax.sgd(0.1), [(GRADS[:2], ITEMS[:2])])[0])


def test_reset_forgets_the_window():
    tx = bb.accumulate(optax.sgd(0.1), 4)
    _, state = train(tx, grads=GRADS[:3], items=ITEMS[:3])
    state = bb.reset(state)
    assert equal(state, tx.init(PARAMS))


def test_no_items_in_a_whole_window_make_no_update():
    tx = bb.accumulate(optax.adam(0.1), 2)
    nothing = jax.tree.map(lambda g: g.at[...].set(np.nan), GRADS[0])  # a mean over no items
    params, state = train(tx, grads=[nothing] * 2, items=[jnp.zeros(())] * 2)
    close(params, PARAMS)
    assert state.last.reason == "the window holds no items"
    params, state = train(tx, grads=[nothing, GRADS[1]], items=[jnp.zeros(()), jnp.ones(())])
    close(params, bare(optax.adam(0.1), [(GRADS[1:2], [1])])[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_adds_up_in_float32(dtype):
    params = jnp.zeros(64, dtype)
    grads = jnp.asarray(1 + rng.normal(size=(256, 64)), dtype)
    exact = np.asarray(grads, np.float64).mean(0)

    def error(**options):
        tx = bb.accumulate(optax.sgd(1.0), 256, **options)
        step = jax.jit(tx.update)
        state = tx.init(params)
        for g in grads:
            updates, state = step(g, state, params, items=1)
        assert updates.dtype == dtype
        return np.linalg.norm(np.asarray(updates, np.float64) + exact) / np.linalg.norm(exact)

    rounding = float(jnp.finfo(dtype).eps) / 2
    assert error() <= rounding
    assert error(dtype=None) > 3 * rounding


def test_counts_in_half_precision_are_widened():
    tx = bb.accumulate(optax.sgd(1.0), 1000)
    step, state = jax.jit(tx.update), tx.init(PARAMS)
    for _ in range(300):
        _, state = step(GRADS[0], state, PARAMS, items=jnp.ones((), jnp.bfloat16))
    assert state.items == 300


def test_the_state_is_saved_by_orbax(tmp_path):
    tx = bb.accumulate(optax.adam(0.1), 4)
    _, state = train(tx, grads=GRADS[:6], items=ITEMS[:6])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    assert equal(state, restored)
    assert isinstance(restored, bb.AccumulateState)


def test_the_state_can_be_donated_and_steps_wait_for_nothing():
    tx = bb.accumulate(optax.adam(0.1), 4)
    step = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(PARAMS)
    _, state = step(GRADS[0], state, PARAMS, items=1.0)
    with Counts() as counts:
        for g in GRADS:
            _, state = step(g, state, PARAMS, items=1.0)
    assert (counts.compiled, counts.waits) == (0, 0)


def test_inside_a_window_a_step_copies_no_slot():
    """The branch that does nothing passes on Adam's moments and the sums in their own memory."""
    params = jnp.zeros((256, 256))
    tx = bb.accumulate(optax.adam(0.1), 4)

    def step(params, state, x):
        grads = jax.grad(lambda p: (jnp.tanh(x @ p) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params, items=1)
        return optax.apply_updates(params, updates), state

    args = params, tx.init(params), jnp.zeros((8, 256))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * params.nbytes
    assert "f64[256,256]{1,0} copy(" not in compiled.as_text()


class TestMistakes:
    def test_options(self):
        with pytest.raises(TypeError, match=r"tx must be an optax\.GradientTransformation\. Received: tx=0\.1"):
            bb.accumulate(0.1, 4)
        with pytest.raises(ValueError, match="partial must be one of 'apply', 'carry', 'drop'"):
            bb.accumulate(optax.sgd(1.0), 4, partial="keep")

    def test_items_are_needed(self):
        tx = bb.accumulate(optax.sgd(1.0), 4)
        with pytest.raises(TypeError, match=r"items must be a number\. Received: items=None"):
            jax.eval_shape(tx.update, GRADS[0], tx.init(PARAMS), PARAMS)
        with pytest.raises(TypeError, match=r"items must be a number\. Received: items=shape \(2,\)"):
            tx.update(GRADS[0], tx.init(PARAMS), PARAMS, items=jnp.ones(2))

    @pytest.mark.parametrize("answer", [0, 2.5, jnp.asarray(2.5), jnp.ones(2, int)])
    def test_a_schedule_that_answers_nonsense(self, answer):
        tx = bb.accumulate(optax.sgd(1.0), lambda k: answer)
        with pytest.raises((TypeError, ValueError), match="every must be"):
            tx.update(GRADS[0], tx.init(PARAMS), PARAMS, items=1)


@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("float16", "float16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("dtype", [jnp.float32, None])
def test_apply_gradients_is_update_and_apply_updates(dtypes, dtype):
    """Whether the sums' memory can hold the updates, or, narrower than they are, cannot."""
    of_params, of_updates = dtypes
    widen = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.astype(of_updates), updates))
    tx = bb.accumulate(optax.chain(optax.adam(0.1), widen), every=3, dtype=dtype)
    poisoned = [jax.tree.map(lambda g: g * jnp.nan, g) if i == 4 else g for i, g in enumerate(GRADS)]

    @jax.jit
    def apart(params, state, grads, items):
        updates, state = tx.update(grads, state, params, items=items)
        assert updates["w"].dtype == of_updates
        return optax.apply_updates(params, updates), state, updates

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads, items):
        return bb.apply_gradients(tx, grads, state, params, items=items)

    params, expected = (jax.tree.map(lambda p: jnp.array(p, of_params), PARAMS) for _ in range(2))
    state, other = tx.init(params), tx.init(params)
    moved = []
    for grads, items in zip(poisoned, ITEMS, strict=True):
        grads = jax.tree.map(lambda g: g.astype(of_params), grads)
        before = jax.tree.map(np.array, params)
        params, state = step(params, state, grads, items)
        expected, other, updates = apart(expected, other, grads, items)
        assert equal(params, expected)
        # Between windows the sums are nobody's: they hold updates in the one, and what came before in the other.
        kept = {} if state.micro_batches else {"grads": None}
        assert equal(state._replace(**kept), other._replace(**kept))
        assert all(np.any(u != 0) == bb.has_updated(state) for u in jax.tree.leaves(updates))
        moved.append(bool(params["b"] != before["b"]))
    assert moved == [False, False, True, False, False, False, False, False]  # the second window is not finite


def test_apply_gradients_makes_no_zeros_and_copies_nothing():
    params = {"w": jnp.ones((512, 512))}
    tx = bb.accumulate(optax.sgd(0.1), every=4)

    def step(params, state, grads):
        return bb.apply_gradients(tx, grads, state, params, items=1)

    state = tx.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * params["w"].nbytes
    where = params["w"].unsafe_buffer_pointer(), state.grads["w"].unsafe_buffer_pointer()
    params, state = compiled(params, state, {"w": jnp.ones((512, 512))})
    assert (params["w"].unsafe_buffer_pointer(), state.grads["w"].unsafe_buffer_pointer()) == where


def test_apply_gradients_refuses_a_state_that_may_hold_updates_of_others():
    tx = optax.chain(bb.accumulate(optax.sgd(0.1), every=2), optax.add_decayed_weights(0.1))
    with pytest.raises(
        TypeError, match=r"state must be the AccumulateState of bb\.accumulate\. Received: state=.*call tx\.update"
    ):
        bb.apply_gradients(tx, GRADS[0], tx.init(PARAMS), PARAMS, items=1)
