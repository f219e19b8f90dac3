"""Random windows of JAX's two APIs, disturbed at random: the full batch's update, or a reason and a clean next window.

What JAX makes anew for other shapes is drawn from short lists, so that compiling does not take the time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import bigbatch.jax as bb

jax.config.update("jax_enable_x64", True)

D, ROWS = 3, 4
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.1, 0.9)),
}
STREAMS = [("sgd", 2, "jit"), ("sgd", 3, "scan"), ("adam", 3, "donated"), ("adam", 2, "vmap"), ("clipped", 3, "jit"),
           ("clipped", "items", "update"), ("adam", 1, "jit"), ("sgd", "schedule", "donated")]  # fmt: skip
ITEMS = 12  # of a window that closes by items
SPLITS = [("linear", 3), ("tied", 2), ("table", 4), ("checkpoint", 3), ("terms", 2), ("dropout", 3), ("complex", 4)]
LENGTH = 10


def example(data: st.DataObject) -> None:
    """One random window, and the one after it."""
    (_stream if data.draw(st.booleans(), "stream") else _split)(data)


# The stream API.


def loss_fn(params: Any, x: Any, weight: Any) -> Any:
    """A mean over weights, of a network with a tied matrix and a complex factor."""
    h = jnp.tanh(x @ params["w"] + params["b"]) @ params["w"].T
    turned = h * jnp.exp(1j * params["c"])
    return (jnp.square(turned.real + turned.imag).sum(1) * weight).sum() / weight.sum()


gradient = jax.jit(jax.value_and_grad(loss_fn))


@functools.cache
def _transformation(optimizer: str, every: Any) -> Any:
    kinds = {"items": bb.items(ITEMS), "schedule": lambda update: jnp.where(update % 2 == 0, 2, 2)}
    return bb.accumulate(OPTIMIZERS[optimizer], every=kinds.get(every, every))


@functools.cache
def _step(optimizer: str, every: Any, way: str) -> Any:
    tx = _transformation(optimizer, every)

    def apply(params: Any, state: Any, grads: Any, items: Any, value: Any) -> Any:
        if way == "update":
            updates, state = tx.update(grads, state, params, items=items, value=value)
            return optax.apply_updates(params, updates), state
        return bb.apply_gradients(tx, grads, state, params, items=items, value=value)

    if way == "donated":
        return jax.jit(apply, donate_argnums=(0, 1))
    if way == "vmap":  # two members, of which one is looked at
        pair = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
        first = functools.partial(jax.tree.map, lambda x: x[0])
        return jax.jit(lambda *args: first(jax.vmap(apply)(*pair(args))))
    if way == "scan":  # of one iteration
        one = functools.partial(jax.tree.map, lambda x: jnp.asarray(x)[None])
        run = lambda params, state, *given: jax.lax.scan(  # noqa: E731
            lambda carry, x: (apply(*carry, *x), None), (params, state), one(given)
        )[0]
        return jax.jit(run)
    return jax.jit(apply)


@functools.cache
def _plain(optimizer: str) -> Any:
    def update(params: Any, inner: Any, grads: Any) -> Any:
        updates, inner = OPTIMIZERS[optimizer].update(grads, inner, params)
        return optax.apply_updates(params, updates), inner

    return jax.jit(update)


def _stream(data: st.DataObject) -> None:
    optimizer, every, way = data.draw(st.sampled_from(STREAMS), "stream")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    tx, step = _transformation(optimizer, every), _step(optimizer, every, way)
    params = {"w": jnp.asarray(rng.normal(size=(D, D))), "b": jnp.asarray(rng.normal(size=D)), "c": jnp.asarray(0.7)}
    state = tx.init(params)
    for window in range(3):
        act = "none" if window == 2 else data.draw(st.sampled_from(["none", *MOVES, *ACTS]), "act")
        params, state = _window(data, rng, (optimizer, every, step, tx), params, state, act)


def _window(data: Any, rng: Any, made: Any, params: Any, state: Any, act: str) -> Any:
    optimizer, every, step, tx = made
    parts = _micro_batches(rng, {"items": 3, "schedule": 2}.get(every, every), every == "items")
    place = data.draw(st.integers(0, len(parts) - 1), "place")
    # Copies on the host, for some steps donate what they are given.
    start, inner = jax.device_get((params, state.inner))
    for k, (x, weight) in enumerate(parts):
        if k == place and act in MOVES:
            params = MOVES[act](rng, params)
            start = jax.device_get(params) if place == 0 else None  # before a window opens anybody may move them
        loss, grads = gradient(params, x, weight)
        given = [params, state, grads, jnp.asarray(weight.sum()), loss]
        if k == place:
            given = ACTS.get(act, _none)(rng, tx, given)
        params, state = step(*given)
        if act == "items" and state.micro_batches == 0:
            break
    batch = [np.concatenate(several) for several in zip(*parts, strict=True)]
    if act in SKIPPED or start is None:
        assert state.last.reason, f"{act} at {place} was taken for a clean window"
        _close(state.inner, inner, f"the inner state after {act}")
        assert int(state.micro_batches) == 0, "a window that was skipped is still open"
    else:
        assert state.last.reason is None, f"{act} at {place}: {state.last.reason}"
        _, grads = gradient(start, *batch)
        right, right_inner = _plain(optimizer)(start, inner, grads)
        _close(params, right, f"{optimizer} after {act} at {place}")
        _close(state.inner, right_inner, f"the inner state after {act}")
    return params, state


def _micro_batches(rng: Any, count: int, by_items: bool) -> list[Any]:
    """Ragged ones, padded to one shape; the first holds items."""
    parts = []
    for k in range(count):
        weight = rng.integers(0, 5, size=ROWS).astype(float)
        weight[0] += k == 0
        if by_items:  # so that the last one, and no other, fills the window
            weight = np.asarray([1.0, 2, 0, 1]) if k < count - 1 else np.full(ROWS, 1.0)
        parts.append((rng.normal(size=(ROWS, D)), weight))
    return parts


def _none(rng: Any, tx: Any, given: Any) -> Any:
    return given


def _instead(k: int, bad: Any) -> Any:
    def act(rng: Any, tx: Any, given: Any) -> Any:
        given = list(given)
        given[k] = jax.tree.map(lambda x: jnp.full_like(x, rng.choice(bad)), given[k])
        return given

    return act


def _refused(mistake: Any) -> Any:
    """An act that must raise, and leave the state as it is."""

    def act(rng: Any, tx: Any, given: Any) -> Any:
        params, state, grads, items, value = given
        before = jax.device_get((params, state))
        try:
            mistake(tx, params, state, grads, items, value)
        except (TypeError, ValueError):
            _close((params, state), before, "after a refusal")
            return given
        raise AssertionError("accepted a mistake without a word")

    return act


def _fork(rng: Any, tx: Any, given: Any) -> Any:
    """Somebody else goes on from the same state, forgets its window, and closes it early."""
    params, state, *_ = jax.tree.map(jnp.array, given)
    bb.reset(state)
    _flush(tx, params, state)
    return given


@functools.cache
def _flusher(tx: Any) -> Any:
    return jax.jit(lambda params, state: bb.flush(tx, state, params))


def _flush(tx: Any, params: Any, state: Any) -> Any:
    return _flusher(tx)(params, state)


MOVES: dict[str, Any] = {
    "an update": lambda rng, p: jax.tree.map(lambda x: x - 0.1 * rng.normal(), p),
    "one bit": lambda rng, p: {**p, "b": p["b"].at[rng.integers(D)].multiply(1 + 4e-16)},
    "a sign": lambda rng, p: {**p, "c": -p["c"]},
    "a swap": lambda rng, p: {**p, "w": jnp.flip(p["w"]), "b": p["b"] * 2},
}
SKIPPED = {"items", "not finite", "infinite", "loss"}
ACTS: dict[str, Any] = {
    "items": _instead(3, [-1.0, -np.inf, np.inf, np.nan]),
    "not finite": _instead(2, [np.nan]),
    "infinite": _instead(2, [np.inf, -np.inf]),
    "loss": _instead(4, [np.nan, np.inf]),
    "fork": _fork,
    "through a checkpoint": lambda rng, tx, given: [
        given[0],
        bb.check_state(tx, jax.device_get(given[1]), given[0]),
        *given[2:],
    ],
    "zeros added": lambda rng, tx, given: [jax.tree.map(lambda x: x + 0.0, given[0]), *given[1:]],
    "grads of another nesting": _refused(lambda tx, p, s, g, n, v: tx.update({"w": g["w"]}, s, p, items=n)),
    "grads of another shape": _refused(lambda tx, p, s, g, n, v: tx.update({**g, "c": jnp.ones(2)}, s, p, items=n)),
    "losses": _refused(lambda tx, p, s, g, n, v: tx.update(g, s, p, items=n, value=jnp.ones(2))),
    "no items": _refused(lambda tx, p, s, g, n, v: tx.update(g, s, p)),
    "items of each": _refused(lambda tx, p, s, g, n, v: tx.update(g, s, p, items=jnp.ones(2))),
    "a line search": _refused(lambda tx, p, s, g, n, v: tx.update(g, s, p, items=n, value_fn=loss_fn)),
    "a negative count": _refused(
        lambda tx, p, s, g, n, v: tx.update(g, s._replace(micro_batches=np.asarray(-1, np.int32)), p, items=n)
    ),
    "a state of nobody": _refused(lambda tx, p, s, g, n, v: tx.update(g, s.inner, p, items=n)),
    "sums of other shapes": _refused(
        lambda tx, p, s, g, n, v: bb.check_state(tx, s._replace(grads={**s.grads, "c": jnp.ones(2)}), p)
    ),
}


# The split API.


def _model(kind: str, p: Any, batch: Any, key: Any) -> Any:
    x, ids = batch["x"], batch["ids"]
    if kind == "tied":
        return jnp.square(jnp.tanh(x @ p["w"]) @ p["w"].T).sum(1)
    if kind == "table":
        return jnp.tanh(p["w"][ids] * x + p["b"]).sum(1)
    if kind == "checkpoint":
        return jax.checkpoint(lambda p, x: jnp.square(jnp.tanh(x @ p["w"] + p["b"])).sum(1))(p, x)
    if kind == "dropout":
        x = x * batch["mask"]
    if kind == "complex":
        return jnp.square(jnp.abs((x @ p["w"]) * jnp.exp(1j * p["b"]) + 1)).sum(1)
    return jnp.square(jnp.tanh(x @ p["w"] + p["b"]) - 0.3).sum(1)


def _masked(kind: str, p: Any, batch: Any, key: Any = None) -> Any:
    weight = batch["weight"]
    loss = (_model(kind, p, batch, key) * weight).sum() / weight.sum(), weight.sum()
    # Of a named term, whatever has no items must be finite.
    return {"a": ((_model("linear", p, batch, key) * weight).sum() / jnp.maximum(weight.sum(), 1), weight.sum()),
            "b": (_model("tied", p, batch, key).mean(), len(weight))} if kind == "terms" else loss  # fmt: skip


@functools.cache
def _ours(kind: str, micro_batch: int, way: str) -> Any:
    loss = functools.partial(_masked, kind)
    found = bb.value_and_grad(loss, has_items=kind != "terms", micro_batch=micro_batch, in_axes=(None, 0))
    if way == "vmap":
        pair = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
        return jax.jit(lambda *args: jax.tree.map(lambda x: x[1], jax.vmap(found)(*pair(args))))
    if way == "scan":
        return jax.jit(lambda *args: jax.tree.map(lambda x: x[0], jax.lax.map(lambda _: found(*args), jnp.arange(1))))
    if way == "shard_map":
        mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec
        found = bb.value_and_grad(
            loss, has_items=kind != "terms", micro_batch=micro_batch, in_axes=(None, 0), axis_name="data"
        )
        return jax.jit(jax.shard_map(found, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec()))
    return jax.jit(found)


@functools.cache
def _full(kind: str) -> Any:
    if kind != "terms":
        return jax.jit(jax.value_and_grad(lambda p, batch: _masked(kind, p, batch)[0]))

    def terms(p: Any, batch: Any) -> Any:
        losses = {name: loss for name, (loss, _) in _masked(kind, p, batch).items()}
        return sum(losses.values()), losses

    def both(p: Any, batch: Any) -> Any:
        (_, losses), grads = jax.value_and_grad(terms, has_aux=True)(p, batch)
        return losses, grads

    return jax.jit(both)


def _split(data: st.DataObject) -> None:
    kind, micro_batch = data.draw(st.sampled_from(SPLITS), "model")
    way = data.draw(st.sampled_from(["jit", "jit", "vmap", "scan", "shard_map"]), "way")
    act = data.draw(st.sampled_from(["none", "padding", "items", "not finite", "huge items", "tiny items"]), "act")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), "seed"))
    params = {"w": jnp.asarray(rng.normal(size=(D, D))), "b": jnp.asarray(rng.normal(size=D))}
    for disturbed in (act, "none"):
        batch = {
            "x": rng.normal(size=(LENGTH, D)),
            "ids": rng.integers(D, size=LENGTH),
            "mask": rng.integers(0, 2, size=(LENGTH, D)),
            "weight": rng.integers(1, 5, size=LENGTH).astype(float),
        }
        scale = {"huge items": 1e30, "tiny items": 1e-30}.get(disturbed, 1.0)
        batch["weight"] *= scale if kind != "terms" else 1
        place = data.draw(st.integers(0, LENGTH - 1), "place")
        if disturbed == "padding":  # of whole micro-batches, and of single examples
            batch["weight"] *= rng.integers(0, 2, size=LENGTH)
            count = LENGTH // micro_batch
            batch["weight"][place % count : count * micro_batch : count] = 0
            batch["weight"][(place + 1) % count] += 1
        elif disturbed == "items":
            batch["weight"][place] = rng.choice([-np.inf, np.inf, np.nan, -1e6])
        elif disturbed == "not finite":
            batch["x"][place] = np.nan
        loss, grads = _ours(kind, micro_batch, way)(params, batch)
        if disturbed in ("items", "not finite"):
            assert not all(np.isfinite(x).all() for x in jax.tree.leaves((loss, grads))), f"{disturbed} gave numbers"
            continue
        right = _full(kind)(params, batch)
        _close((loss, grads), right, f"{kind} by {micro_batch}, {way}, {disturbed}")


def _close(got: Any, right: Any, what: str) -> None:
    """To 1e-12 of each array's norm."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, f"{what}: {a.shape} where {b.shape} is right"
        if not np.array_equal(a, b, equal_nan=True):
            off = float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-3)
            assert off <= 1e-12, f"{what}: off by {off:.1e}"
