"""Every optax transformation inside `accumulate`: as by itself, with gradients of the parameters' dtype or wider."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bigbatch.jax as bb

rng = np.random.default_rng(7)
PARAMS = {"w": jnp.asarray(rng.normal(size=(8, 4))), "b": jnp.asarray(rng.normal(size=4))}
WINDOWS = [[jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), PARAMS) for _ in range(2)] for _ in range(2)]
ITEMS, VALUES = (3.0, 1.0), (2.0, 4.0)

# What a factory needs beside its defaults, as a call of it.
CALLS = {
    "add_noise": lambda f: f(0.1, 0.5, key=0),
    "noisy_sgd": lambda f: f(0.1, key=0),
    "adaptive_grad_clip": lambda f: f(0.1),
    "add_decayed_weights": lambda f: f(0.1),
    "apply_every": lambda f: f(2),
    "apply_if_finite": lambda f: f(optax.adam(0.1), 3),
    "chain": lambda f: f(optax.clip(1.0), optax.adam(0.1)),
    "clip": lambda f: f(0.5),
    "clip_by_block_rms": lambda f: f(0.5),
    "clip_by_global_norm": lambda f: f(0.5),
    "conditionally_mask": lambda f: f(optax.sgd(0.1), lambda step, **_: step % 2 == 0),
    "conditionally_transform": lambda f: f(optax.sgd(0.1), lambda step, **_: step % 2 == 0),
    "ema": lambda f: f(0.9),
    "flatten": lambda f: f(optax.adam(0.1)),
    "masked": lambda f: f(optax.sgd(0.1), {"w": True, "b": False}),
    "multi_transform": lambda f: f({"a": optax.sgd(0.1), "b": optax.adam(0.1)}, {"w": "a", "b": "b"}),
    "partition": lambda f: f({"a": optax.sgd(0.1), "b": optax.adam(0.1)}, {"w": "a", "b": "b"}),
    "named_chain": lambda f: f(("a", optax.clip(1.0)), ("b", optax.adam(0.1))),
    "scale": lambda f: f(-0.1),
    "scale_by_learning_rate": lambda f: f(0.1),
    "scale_by_schedule": lambda f: f(lambda count: -0.1 / (1 + count)),
    "stateless": lambda f: f(lambda updates, params: updates),
    "stateless_with_tree_map": lambda f: f(lambda u, p: u + p),
    "selective_transform": lambda f: f(optax.sgd(0.1), freeze_mask={"w": True, "b": False}),
    "freeze": lambda f: f({"w": True, "b": False}),
    "skip_large_updates": None,  # a predicate
    "snapshot": lambda f: f("grads", lambda updates, **_: updates),
    "trace": lambda f: f(0.9),
    "contrib.mechanize": lambda f: f(optax.sgd(0.1)),
    "contrib.sam": lambda f: f(optax.sgd(0.1), optax.sgd(0.05), sync_period=2),
    "contrib.schedule_free": lambda f: f(optax.sgd(0.1), 0.1),
    "contrib.split_real_and_imaginary": lambda f: f(optax.adam(0.1)),
    "contrib.galore": lambda f: f(0.1, rank=2),
    "contrib.scale_by_galore": lambda f: f(rank=2),
}
# Those that evaluate the loss by themselves.
REFUSED = {"lbfgs", "scale_by_backtracking_linesearch", "scale_by_zoom_linesearch", "contrib.sophia",
           "contrib.hutchinson_estimator_diag_hessian"}  # fmt: skip
# Those that take something else than the mean gradient: one for each example, or parameters of a kind of their own.
OTHER = {"contrib.dpsgd", "contrib.differentially_private_aggregate", "lookahead"}
# The one runs inside optax.contrib.muon only; the other changes the structure of its state.
OTHER_PARTS = {"contrib.scale_by_muon", "monitor"}
NEED_A_RATE = ("learning_rate", "max_learning_rate")


def made(name, factory):
    """A transformation by this factory, or None where it makes none by itself."""
    if name in CALLS:
        return CALLS[name] and CALLS[name](factory)
    try:
        wanted = [p for p in inspect.signature(factory).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):
        return None
    rates = {p.name: 0.1 for p in wanted if p.name in NEED_A_RATE}
    wanted = [p for p in wanted if p.name not in rates and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if wanted:
        return None
    with warnings.catch_warnings(action="ignore"):  # some factories are deprecated
        try:
            return factory(**rates)
        except (TypeError, ValueError):
            return None


def factories():
    found = {}
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name in sorted(vars(module)):
            factory = getattr(module, name)
            if (
                name.startswith("_")
                or inspect.isclass(factory)
                or not callable(factory)
                or prefix + name in REFUSED | OTHER | OTHER_PARTS
            ):
                continue
            tx = made(prefix + name, factory)
            if isinstance(tx, optax.GradientTransformation):
                found[prefix + name] = tx
    return found


FACTORIES = factories()


def mean(window):
    return jax.tree.map(lambda *g: sum(n * x for n, x in zip(ITEMS, g, strict=True)) / sum(ITEMS), *window)


def takes_value(tx):
    """optax.contrib.sam takes no arguments but its own."""
    parameters = inspect.signature(tx.update).parameters.values()
    return any(p.kind is p.VAR_KEYWORD or p.name == "value" for p in parameters)


def by_itself(tx, params, windows):
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    loss = sum(n * v for n, v in zip(ITEMS, VALUES, strict=True)) / sum(ITEMS)
    extra = {"value": jnp.asarray(loss)} if takes_value(tx) else {}
    for window in windows:
        updates, state = tx.update(window, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def accumulated(tx, params, windows):
    tx = bb.accumulate(tx, every=2)
    state = tx.init(params)
    step = jax.jit(lambda g, s, p, n, v: bb.apply_gradients(tx, g, s, p, items=n, value=v))
    for window in windows:
        for grads, n, v in zip(window, ITEMS, VALUES, strict=True):
            params, state = step(grads, state, params, n, v)
        assert bb.has_updated(state), state.last.reason
    return params, state.inner


def close(got, right, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(b).max(initial=0))))


def test_the_sweep_finds_them():
    assert len(FACTORIES) > 80
    assert {"adam", "adafactor", "polyak_sgd", "contrib.momo", "contrib.prodigy", "contrib.muon"} <= set(FACTORIES)


@pytest.mark.parametrize("name", FACTORIES)
def test_it_is_as_by_itself(name):
    """Parameters, and the inner state to the last entry.

    Not compiled: that would be most of this file's time. The test of 16-bit parameters below traces every one of them
    inside the branches of an open window, and others are compiled.
    """
    with jax.disable_jit():
        ours = accumulated(FACTORIES[name], PARAMS, WINDOWS)
        close(ours, by_itself(FACTORIES[name], PARAMS, map(mean, WINDOWS)), 1e-11)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "contrib.muon", "contrib.schedule_free", "multi_transform"])
def test_compiled_it_is_as_by_itself(name):
    close(accumulated(FACTORIES[name], PARAMS, WINDOWS), by_itself(FACTORIES[name], PARAMS, map(mean, WINDOWS)), 1e-11)


HALF = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
SINGLE = [[jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in window] for window in WINDOWS]
# Those that do not take gradients wider than the parameters, by themselves.
UNABLE = {"apply_if_finite", "novograd", "scale_by_novograd", "contrib.galore", "contrib.scale_by_galore",
          "contrib.mechanize"}  # fmt: skip


def types_of_two_updates(step, init):
    """Of the parameters and the state: nothing is compiled, and every branch is traced."""

    def both():
        carry = HALF, init(HALF)
        for _ in range(2):
            carry = step(SINGLE[0][0], *carry)
        return carry

    return jax.eval_shape(both)


@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # of optax.scale_by_lbfgs
@pytest.mark.parametrize("name", FACTORIES)
def test_float32_gradients_of_16_bit_parameters_are_taken_as_by_itself(name):
    """As from a loss scaler. The inner state is in whatever dtype it is in by itself, and so are the parameters."""
    inner = optax.with_extra_args_support(FACTORIES[name])
    tx = bb.accumulate(inner, every=2)  # so that it runs in a branch
    extra = {"value": jnp.asarray(1.0)} if takes_value(inner) else {}

    def plain(grads, params, state):
        updates, state = inner.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def ours(grads, params, state):
        return bb.apply_gradients(tx, grads, state, params, items=2, value=jnp.asarray(1.0))

    if name in UNABLE:
        with pytest.raises(TypeError):
            types_of_two_updates(plain, inner.init)
        with pytest.raises(TypeError):
            types_of_two_updates(ours, tx.init)
        return
    params, state = types_of_two_updates(ours, tx.init)
    got, right = jax.tree.map(
        lambda x: (x.shape, x.dtype), ((params, state.inner), types_of_two_updates(plain, inner.init))
    )
    assert got == right


@pytest.mark.parametrize("name", ["adam", "adafactor", "lion", "sgd", "contrib.prodigy"])
def test_float32_gradients_of_16_bit_parameters(name):
    half = [SINGLE[0], SINGLE[1]]
    close(accumulated(FACTORIES[name], HALF, half), by_itself(FACTORIES[name], HALF, map(mean, half)), 2**-6)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_evaluates_the_loss_by_itself_is_refused_by_init(name):
    factory = functools.reduce(getattr, name.split("."), optax)
    needs = {
        "scale_by_backtracking_linesearch": {"max_backtracking_steps": 5},
        "scale_by_zoom_linesearch": {"max_linesearch_steps": 5},
        "contrib.sophia": {"learning_rate": 0.1},
    }
    inner = factory(**needs.get(name, {}))
    for tx in (inner, optax.chain(optax.clip(1.0), inner), optax.masked(inner, {"w": True, "b": False})):
        for init in (bb.accumulate(tx, every=2).init, jax.jit(bb.accumulate(tx, every=2).init)):
            with pytest.raises(TypeError, match=r"A line search .*last micro-batch only.*Received: .*State\."):
                init(PARAMS)


@pytest.mark.parametrize("extra", ["grad", "value_fn", "obj_fn", "grad_fn"])
def test_functions_of_one_micro_batch_are_refused(extra):
    tx = bb.accumulate(optax.sgd(0.1), every=2)
    with pytest.raises(TypeError, match=rf"A line search .*Received: {extra}=…"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, items=1, **{extra: lambda p: 0.0})


def test_lbfgs_without_its_line_search():
    tx = optax.lbfgs(0.1, linesearch=None)
    close(accumulated(tx, PARAMS, WINDOWS), by_itself(tx, PARAMS, map(mean, WINDOWS)), 1e-11)


def test_lbfgs_with_its_line_search_at_the_split_api():
    """The way that the refusal names: the whole batch's loss and gradient, micro-batch by micro-batch."""
    x, y = jnp.asarray(rng.normal(size=(12, 8))), jnp.asarray(rng.normal(size=(12, 4)))

    def loss_fn(params, batch):
        x, y = batch
        return jnp.square(jnp.tanh(x @ params["w"]) + params["b"] - y).mean()

    def trained(value_and_grad):
        tx, params = optax.lbfgs(), PARAMS
        state = tx.init(params)
        for _ in range(2):
            value_fn = lambda p: value_and_grad(p, (x, y))[0]  # noqa: E731
            value, grad = value_and_grad(params, (x, y))
            updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
            params = optax.apply_updates(params, updates)
        return params

    with jax.disable_jit():
        close(trained(bb.value_and_grad(loss_fn, micro_batch=5)), trained(jax.value_and_grad(loss_fn)), 1e-9)


@pytest.mark.filterwarnings('ignore:"seed" is deprecated')  # within optax.contrib.dpsgd
@pytest.mark.parametrize("name", sorted(OTHER))
def test_what_takes_other_gradients_is_refused(name):
    factory = functools.reduce(getattr, name.split("."), optax)
    calls = {
        "lookahead": lambda f: f(optax.sgd(0.1), 2, 0.5),
        "contrib.dpsgd": lambda f: f(0.1, 1.0, 0.1, 0),
        "contrib.differentially_private_aggregate": lambda f: f(1.0, 0.1, 0),
    }
    tx = bb.accumulate(calls[name](factory), every=2)
    params = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    grads = PARAMS if name == "lookahead" else jax.tree.map(lambda g: jnp.stack([g] * 3), PARAMS)
    with pytest.raises(ValueError, match="grads must"):
        tx.update(grads, tx.init(params), params, items=3)


def test_items_and_value_are_kept_from_what_takes_neither():
    """optax.contrib.sam knows no extra argument, alone or in a chain."""
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), sync_period=2)
    for tx in (sam, optax.chain(optax.clip(10.0), sam)):
        found, _ = accumulated(tx, PARAMS, WINDOWS)
        close(found, by_itself(sam, PARAMS, map(mean, WINDOWS))[0], 1e-11)


def test_a_state_that_changes_its_structure_is_refused():
    """What no compiled branch can hand on: optax.monitor begins without the entries that it then has."""
    tx = bb.accumulate(optax.monitor({"norm": lambda updates, *_, **__: optax.tree.norm(updates)}), every=2)
    with pytest.raises(ValueError, match=r"state\.inner must be nested as .*or tx changes it as it runs"):
        tx.update(WINDOWS[0][0], tx.init(PARAMS), PARAMS, items=1)
