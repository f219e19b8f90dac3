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
WINDOWS = [[jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), PARAMS) for _ in range(2)] for _ in range(3)]
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
    "monitor": lambda f: f({"norm": lambda updates, **_: optax.global_norm(updates)}),
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
                or prefix + name in REFUSED | OTHER
            ):
                continue
            tx = made(prefix + name, factory)
            if isinstance(tx, optax.GradientTransformation):
                found[prefix + name] = tx
    return found


FACTORIES = factories()


def mean(window):
    return jax.tree.map(lambda *g: sum(n * x for n, x in zip(ITEMS, g, strict=True)) / sum(ITEMS), *window)


def by_itself(tx, params, windows):
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    loss = sum(n * v for n, v in zip(ITEMS, VALUES, strict=True)) / sum(ITEMS)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, value=jnp.asarray(loss)))
    for window in windows:
        updates, state = step(window, state, params)
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
    close(*(f(FACTORIES[name], PARAMS, w) for f, w in ((accumulated, WINDOWS), (by_itself, map(mean, WINDOWS)))), 1e-11)


@pytest.mark.parametrize("name", FACTORIES)
def test_float32_gradients_of_16_bit_parameters(name):
    """As from a loss scaler. The inner state is in whatever dtype it is in by itself, and so are the parameters."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    single = [[jax.tree.map(lambda g: g.astype(jnp.float32), g) for g in window] for window in WINDOWS[:2]]
    try:
        right = by_itself(FACTORIES[name], half, list(map(mean, single)))
    except (TypeError, ValueError):
        pytest.skip("does not take them by itself")
    close(accumulated(FACTORIES[name], half, single), right, 2**-6)


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
        for _ in range(3):
            value_fn = lambda p: value_and_grad(p, (x, y))[0]  # noqa: E731
            value, grad = value_and_grad(params, (x, y))
            updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
            params = optax.apply_updates(params, updates)
        return params

    close(trained(jax.jit(bb.value_and_grad(loss_fn, micro_batch=5))), trained(jax.value_and_grad(loss_fn)), 1e-9)


@pytest.mark.parametrize("name", sorted(OTHER))
def test_what_takes_other_gradients_is_refused(name):
    factory = functools.reduce(getattr, name.split("."), optax)
    calls = {
        "lookahead": lambda f: f(optax.sgd(0.1), 2, 0.5),
        "contrib.dpsgd": lambda f: f(0.1, 1.0, 0.1, key=0),
        "contrib.differentially_private_aggregate": lambda f: f(1.0, 0.1, key=0),
    }
    tx = bb.accumulate(calls[name](factory), every=2)
    params = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    grads = PARAMS if name == "lookahead" else jax.tree.map(lambda g: jnp.stack([g] * 3), PARAMS)
    with pytest.raises(ValueError, match="grads must"):
        tx.update(grads, tx.init(params), params, items=3)
