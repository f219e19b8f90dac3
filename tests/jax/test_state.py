"""The state of `accumulate`: one that is not its own is refused, and parameters that move inside a window skip it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import bigbatch.jax as bb
from bigbatch.jax.state import checksum

rng = np.random.default_rng(6)
PARAMS = {"w": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}
GRADS = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), PARAMS) for _ in range(4)]
TX = bb.accumulate(optax.adam(0.1), every=3)
STEP = jax.jit(lambda grads, state, params: bb.apply_gradients(TX, grads, state, params, items=2))
UPDATE = jax.jit(functools.partial(TX.update, items=2))


def close(got, right, tolerance=1e-13):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def mean(grads):
    return jax.tree.map(lambda *g: sum(g) / len(g), *grads)


def plain(params, grads):
    tx = optax.adam(0.1)
    return optax.apply_updates(params, tx.update(mean(grads), tx.init(params), params)[0])


def negated_in_one_place(params):
    return {**params, "b": params["b"].at[0].multiply(-1)}


MOVES = {
    "an update": lambda p: jax.tree.map(lambda x: x - 0.1, p),
    "one number's last bit": lambda p: {**p, "b": p["b"].at[1].set(np.nextafter(np.asarray(p["b"][1]), np.inf))},
    "one sign": negated_in_one_place,
    "every sign": lambda p: jax.tree.map(jnp.negative, p),
    "another checkpoint": lambda p: jax.tree.map(jnp.zeros_like, p),
    "another dtype": lambda p: jax.tree.map(lambda x: x.astype(jnp.float32), p),
}


class TestParameters:
    @pytest.mark.parametrize("move", MOVES)
    @pytest.mark.parametrize("place", [1, 2])
    @pytest.mark.parametrize("api", ["apply_gradients", "update"])
    def test_that_move_inside_a_window_skip_it(self, move, place, api):
        params, state = PARAMS, TX.init(PARAMS)
        for k in range(3):
            if k == place:
                params = moved = MOVES[move](params)
            if api == "update":
                updates, state = UPDATE(GRADS[k], state, params)
                params = optax.apply_updates(params, updates)
            else:
                params, state = STEP(GRADS[k], state, params)
        assert state.last.reason.startswith("the params changed inside the window")
        assert state.updates == 0
        close(params, moved, 0)
        for k in range(3):
            params, state = STEP(GRADS[k], state, params)
        assert bb.has_updated(state)
        close(params, plain(moved, GRADS[:3]), 1e-6 if move == "another dtype" else 1e-13)

    @pytest.mark.parametrize("count", [1, 2])
    def test_that_move_before_a_flush_skip_it(self, count):
        state = TX.init(PARAMS)
        for k in range(count):
            _, state = UPDATE(GRADS[k], state, PARAMS)
        moved = MOVES["an update"](PARAMS)
        updates, state = bb.flush(TX, state, moved)
        assert state.last.reason.startswith("the params changed inside the window")
        assert not any(map(np.any, jax.tree.leaves(updates)))

    def test_may_move_between_windows_and_come_back_within_one(self):
        """As where a moving average is swapped in to evaluate."""
        params, state = PARAMS, TX.init(PARAMS)
        for k in range(3):
            params, state = STEP(GRADS[k], state, params)
        params = moved = MOVES["an update"](params)
        held = state
        for k in range(3):
            params, state = STEP(GRADS[k], state, params)
        assert bb.has_updated(state)
        swapped, other = STEP(GRADS[0], held, moved)
        _ = jax.tree.map(jnp.zeros_like, swapped)
        for k in (1, 2):
            swapped, other = STEP(GRADS[k], other, swapped)
        close(swapped, params, 0)

    def test_zeros_that_change_their_sign_have_not_moved(self):
        """-0.0 + 0.0 is 0.0: what adding an update of zeros makes of a parameter."""
        params = {"w": -jnp.zeros((3, 2)), "b": jnp.ones(2)}
        state = TX.init(params)
        for k in range(3):
            updates, state = UPDATE(GRADS[k], state, params)
            params = optax.apply_updates(params, updates)
        assert bb.has_updated(state)

    def test_are_not_known_where_none_are_given(self):
        tx = bb.accumulate(optax.sgd(0.1), every=2)
        _, state = tx.update(GRADS[0], tx.init(PARAMS), items=1)
        updates, state = tx.update(GRADS[1], state, PARAMS, items=1)
        close(updates, jax.tree.map(lambda g: -0.1 * g, mean(GRADS[:2])))

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "complex64",
                                       "complex128", "int32", "int8", "bool", "int4"])  # fmt: skip
    @pytest.mark.parametrize("size", [1, 7, 50_000])
    def test_every_bit_is_in_the_checksum(self, dtype, size):
        x = jnp.asarray(rng.normal(size=size) * 2, dtype)
        before = checksum([x])
        assert before == checksum([jnp.array(x)]) != 0
        for place in {0, size // 2, size - 1}:
            other = ~x[place] if dtype == "bool" else x[place] + jnp.ones((), dtype)
            assert checksum([x.at[place].set(other)]) != before
        if size > 7 and dtype != "bool":
            assert checksum([x, x + jnp.ones((), dtype)]) != checksum([x + jnp.ones((), dtype), x])


BROKEN = {
    "micro_batches=-1": lambda s: s._replace(micro_batches=jnp.asarray(-1, jnp.int32)),
    "updates=-4": lambda s: s._replace(updates=np.asarray(-4, np.int32)),
    "items=-2.0": lambda s: s._replace(items=jnp.asarray(-2.0)),
    "items=inf": lambda s: s._replace(items=np.asarray(np.inf)),
    "unit=-1.0": lambda s: s._replace(unit=np.asarray(-1.0)),
    "last.skipped=77": lambda s: s._replace(last=s.last._replace(skipped=np.asarray(77, np.int32))),
}


MADE_OTHERWISE = {
    "items of another dtype": lambda s: s._replace(items=s.items.astype(jnp.float32)),
    "a count that is no whole number": lambda s: s._replace(micro_batches=s.micro_batches.astype(float)),
    "a count for each device": lambda s: s._replace(updates=jnp.zeros(2, jnp.int32)),
    "a sum of another shape": lambda s: s._replace(grads={**s.grads, "b": jnp.zeros(3)}),
    "sums of other parameters": lambda s: s._replace(grads={"w": s.grads["w"]}),
    "no sums": lambda s: s._replace(grads=None),
    "last of another dtype": lambda s: s._replace(last=s.last._replace(loss=s.last.loss.astype(jnp.float16))),
    "no last": lambda s: s._replace(last=None),
    "moments of another shape": lambda s: s._replace(inner=jax.tree.map(lambda x: x[None], s.inner)),
}


class TestRestored:
    def saved(self):
        state = TX.init(PARAMS)
        for k in range(2):
            _, state = UPDATE(GRADS[k], state, PARAMS)
        return state

    @pytest.mark.parametrize("broken", BROKEN)
    def test_counts_that_are_none(self, broken):
        state = jax.block_until_ready(BROKEN[broken](self.saved()))
        words = rf"must be a finite number of at least 0\. Received: state\.{broken}"
        for call in (
            lambda: bb.check_state(TX, state, PARAMS),
            lambda: TX.update(GRADS[0], state, PARAMS, items=2),
            lambda: bb.apply_gradients(TX, GRADS[0], state, PARAMS, items=2),
            lambda: bb.flush(TX, state, PARAMS),
        ):
            with pytest.raises(ValueError, match=words):
                call()

    @pytest.mark.parametrize("change", MADE_OTHERWISE)
    @pytest.mark.parametrize("jit", [True, False])
    def test_another_structure_shape_or_dtype(self, change, jit):
        state = MADE_OTHERWISE[change](self.saved())
        with pytest.raises(ValueError, match="The state is not one of this transformation and these parameters: "):
            bb.check_state(TX, state, PARAMS)
        call = functools.partial(TX.update, items=2)
        with pytest.raises(ValueError, match=r"The state is not one of|grads must"):
            (jax.jit(call) if jit else call)(GRADS[0], state, PARAMS)

    def test_an_inner_state_of_another_optimizer(self):
        other = bb.accumulate(optax.sgd(0.1, momentum=0.9), every=3).init(PARAMS)
        with pytest.raises(ValueError, match="nested as"):
            bb.check_state(TX, other, PARAMS)

    def test_what_is_no_state_of_ours(self):
        with pytest.raises(TypeError, match=r"The state holds no AccumulateState of bb\.accumulate\. Received: dict"):
            bb.check_state(TX, {"updates": 0}, PARAMS)
        for state in (optax.adam(0.1).init(PARAMS), self.saved()._asdict(), None):
            for call in (
                lambda s=state: TX.update(GRADS[0], s, PARAMS, items=2),
                lambda s=state: bb.flush(TX, s, PARAMS),
                lambda s=state: bb.reset(s),
                lambda s=state: bb.has_updated(s),
            ):
                with pytest.raises(TypeError, match="holds no AccumulateState"):
                    call()

    def test_a_good_one_passes_and_goes_on(self, tmp_path):
        state = self.saved()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            checkpointer.wait_until_finished()
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, TX.init(PARAMS))
            restored = checkpointer.restore(tmp_path / "state", target)
        restored = bb.check_state(TX, restored, PARAMS)
        params, _ = STEP(GRADS[2], restored, PARAMS)
        close(params, plain(PARAMS, GRADS[:3]))
        chained = optax.chain(optax.identity(), TX)
        inside = chained.init(PARAMS)
        assert bb.check_state(chained, inside, PARAMS) is inside
        numbers = jax.device_get(state)  # as arrays of NumPy, which some checkpoints come back as
        close(STEP(GRADS[2], bb.check_state(TX, numbers, PARAMS), PARAMS)[0], plain(PARAMS, GRADS[:3]))


class TestGradients:
    def test_of_another_nesting_or_shape(self):
        state = TX.init(PARAMS)
        with pytest.raises(ValueError, match="grads must be nested as the parameters that init was given"):
            TX.update({"w": GRADS[0]["w"]}, state, PARAMS, items=1)
        with pytest.raises(ValueError, match=r"grads must have the shapes.*Received: grads\['b'\]=shape \(1,\)"):
            TX.update({**GRADS[0], "b": jnp.ones(1)}, state, PARAMS, items=1)
        for_each = jax.tree.map(lambda g: jnp.stack([g] * 5), GRADS[0])  # one an example
        with pytest.raises(ValueError, match="grads must have the shapes"):
            TX.update(for_each, state, PARAMS, items=1)

    def test_wider_than_the_parameters_are_added_up_so(self):
        """Sums of float64 gradients of float32 parameters: a mean of numbers that float32 cannot hold."""
        params = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
        tx = bb.accumulate(optax.identity(), every=3)
        state = tx.init(params)
        for g in GRADS[:3]:
            updates, state = jax.jit(functools.partial(tx.update, items=2))(g, state, params)
        close(updates, mean(GRADS[:3]), 1e-15)
