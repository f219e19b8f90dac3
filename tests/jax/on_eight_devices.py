"""Run by test_sharded.py in a process of its own, with eight CPU devices; prints what each case came to as JSON.

A case is a program, its inputs and what it must equal. Collectives are read from the compiled HLO: those inside the
loop, and those outside, by kind.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bigbatch.jax as bb

jax.config.update("jax_enable_x64", True)
COLLECTIVE = re.compile(r"= .*? (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(.*")
AXES = (None, 0, 0)

rng = np.random.default_rng(0)
PARAMS = {"a": rng.normal(size=(6, 8)), "b": rng.normal(size=8)}
X, WEIGHT = rng.normal(size=(64, 6)), rng.integers(0, 5, size=64).astype(float)  # as many items as it comes


def loss_fn(params, x, weight):
    h = jnp.tanh(x @ params["a"]) @ params["b"]
    return (weight * h**2).sum() / weight.sum(), weight.sum()


def terms_fn(params, x, weight):
    h = jnp.tanh(x @ params["a"]) @ params["b"]
    return {"h": loss_fn(params, x, weight), "mean": ((h**3).mean(), 1)}


def collectives(compiled):
    """For each collective its kind and whether it stands in the loop's body."""
    inside, found = False, []
    for line in compiled.as_text().splitlines():
        if line.endswith("{"):
            inside = not line.startswith("ENTRY")
        if match := COLLECTIVE.search(line):
            groups = re.search(r"replica_groups=(mesh\[.*?\] \{.*?\}|\S+?),? ", line)
            found.append({"kind": match[1], "inside": inside, "groups": groups and groups[1]})
    return found


def measure(function, *args, expected):
    compiled = jax.jit(function).lower(*args).compile()
    pairs = zip(jax.tree.leaves(compiled(*args)), jax.tree.leaves(expected), strict=True)
    error = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    return {"error": error, "collectives": collectives(compiled)}


def door(function=loss_fn, **options):
    has_items = function is not terms_fn
    return bb.value_and_grad(function, in_axes=AXES, has_items=has_items, **{"micro_batch": 16, **options})


def mesh(kinds, shape=(8,)):
    """A mesh with a data axis, and a model axis where there are two kinds."""
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=tuple(getattr(AxisType, k) for k in kinds))


def placed(model=None):
    params = {"a": jax.device_put(PARAMS["a"], P(None, model)), "b": jax.device_put(PARAMS["b"], P(model))}
    return params, jax.device_put(X, P("data")), jax.device_put(WEIGHT, P("data"))


def main():
    full = jax.value_and_grad(lambda *args: loss_fn(*args)[0])(PARAMS, X, WEIGHT)
    results = {}
    for kind in ("Auto", "Explicit"):
        with jax.set_mesh(mesh([kind])):
            args = placed()
            results[f"compiler {kind}"] = measure(door(), *args, expected=full)
            results[f"mesh {kind}"] = measure(door(axis_name="data"), *args, expected=full)
            for check in (True, False):
                mapped = jax.shard_map(
                    door(axis_name="data", micro_batch=2),
                    in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=check,
                )  # fmt: skip
                results[f"shard_map {kind} check_vma={check}"] = measure(mapped, *args, expected=full)
                results[f"chunked {kind} check_vma={check}"] = chunked(check)
        with jax.set_mesh(mesh([kind, "Auto"], (4, 2))):
            results[f"model {kind}"] = measure(door(axis_name="data"), *placed("model"), expected=full)

    with jax.set_mesh(mesh(["Auto"])):
        args = placed()
        total = lambda *args: jax.tree.reduce(jnp.add, [loss for loss, _ in terms_fn(*args).values()])  # noqa: E731
        means = {name: loss for name, (loss, _) in terms_fn(PARAMS, X, WEIGHT).items()}
        # "mean" is a mean of micro-batches' and devices' means, which here is the mean over examples.
        terms = door(terms_fn, axis_name="data")
        results["terms"] = measure(terms, *args, expected=(means, jax.grad(total)(PARAMS, X, WEIGHT)))
        results["aux"] = measure(aux_door, *args, expected=aux_expected())
        results["ragged"] = measure(
            door(axis_name="data"), args[0], X[:40], WEIGHT[:40],
            expected=jax.value_and_grad(lambda *args: loss_fn(*args)[0])(PARAMS, X[:40], WEIGHT[:40]),
        )  # fmt: skip
        results["dropout"] = dropout()
        results["refused"] = [
            refused(door(axis_name="data", micro_batch=12), *args),
            refused(door(axis_name="no"), *args),
        ]
    results["documented"] = documented()
    for kind in ("Auto", "Explicit"):
        results[f"spread {kind}"] = spread(kind)
    results["differs"] = differs()
    json.dump(results, sys.stdout)


def aux_loss(params, x, weight):
    loss, items = loss_fn(params, x, weight)
    return (loss, items), {"rows": x * 2, "weight": weight.sum(), "mean": (weight * x[:, 0]).sum() / weight.sum()}


def aux_door(*args):
    words = {"rows": "concatenate", "weight": "sum", "mean": "mean"}
    (_, aux), _ = door(aux_loss, axis_name="data", has_aux=True, aux=words)(*args)
    return aux


def aux_expected():
    return {"rows": X * 2, "weight": WEIGHT.sum(), "mean": (WEIGHT * X[:, 0]).sum() / WEIGHT.sum()}


def dropout():
    """The draws of 64 examples in 4 micro-batches on 8 devices, 2 a device at a time."""

    def draw(params, x, key):
        return (params * x).sum(), jax.random.uniform(key, (len(x),))

    drawing = bb.value_and_grad(
        draw, has_aux=True, aux="concatenate", micro_batch=16, in_axes=(None, 0, None), axis_name="data"
    )
    (_, draws), _ = jax.jit(drawing)(1.0, X, jax.random.key(0))
    return len(set(np.asarray(draws).tolist()))


def documented():
    """The page's example: a mesh as `jax.make_mesh` makes it, and arrays that nobody has put anywhere."""
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    expected = jax.value_and_grad(lambda *args: loss_fn(*args)[0])(PARAMS, X, WEIGHT)
    errors = []
    with jax.set_mesh(mesh):
        for make in (jnp.asarray, np.asarray):
            args = jax.tree.map(make, (PARAMS, X, WEIGHT))
            for wrap in (jax.jit, lambda f: f):
                pairs = zip(
                    jax.tree.leaves(wrap(door(axis_name="data"))(*args)), jax.tree.leaves(expected), strict=True
                )
                errors += [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs]
        planned = bb.plan(loss_fn, has_items=True, in_axes=AXES, axis_name="data")(*args).micro_batch
    return {"error": max(errors), "planned": planned}


def spread(kind):
    """Parameters that lie on the examples' axis: their gradients, and whether these lie there too."""
    expected = jax.value_and_grad(lambda *args: loss_fn(*args)[0])(PARAMS, X, WEIGHT)
    with jax.set_mesh(mesh([kind])):
        _, x, weight = placed()
        # The first along its columns, the second whole, as small ones are.
        params = {"a": jax.device_put(PARAMS["a"], P(None, "data")), "b": jax.device_put(PARAMS["b"], P())}
        kept, errors = [], []
        for wrap in (jax.jit, lambda f: f):
            for size in (16, 64):
                found = wrap(door(axis_name="data", micro_batch=size))(params, x, weight)
                pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
                errors += [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs]
                kept += [g.sharding.is_equivalent_to(params[name].sharding, g.ndim) for name, g in found[1].items()]
        tx = bb.accumulate(optax.adam(0.1), every=2)
        state = tx.init(params)
        step = jax.jit(lambda g, s, p: bb.apply_gradients(tx, g, s, p, items=2))
        for _ in range(2):
            updated, state = step(found[1], state, params)
        right = optax.apply_updates(PARAMS, optax.adam(0.1).update(expected[1], optax.adam(0.1).init(PARAMS))[0])
        pairs = zip(jax.tree.leaves(updated), jax.tree.leaves(right), strict=True)
        errors += [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs]
        kept += [p.sharding.is_equivalent_to(params[name].sharding, p.ndim) for name, p in updated.items()]
    return {"error": max(errors), "kept": kept}


def differs():
    """Parameters that a shard_map hands out in pieces."""
    with jax.set_mesh(mesh(["Auto"])):
        specs = ({"a": P(), "b": P("data")}, P("data"), P("data"))
        return refused(jax.shard_map(door(axis_name="data", micro_batch=2), in_specs=specs, out_specs=P()), *placed())


def chunked(check):
    """A contrastive loss of all devices' examples, each device's in pieces: 8 examples, of which 3 in memory."""

    def encode(params, x):
        return jnp.tanh(x @ params["a"]) * params["b"]

    def contrastive(a):
        return -jnp.diag(jax.nn.log_softmax(a @ jnp.roll(a, 1, 0).T)).mean()

    def of_all(params, x):
        part = bb.chunked(encode, micro_batch=3)(params, x)
        return jax.lax.pmean(contrastive(jax.lax.all_gather(part, "data", tiled=True)), "data")

    mapped = jax.shard_map(of_all, in_specs=(P(), P("data")), out_specs=P(), check_vma=check)
    args = placed()[:2]
    expected = jax.value_and_grad(lambda params, x: contrastive(encode(params, x)), (0, 1))(PARAMS, X)
    return measure(jax.value_and_grad(mapped, (0, 1)), *args, expected=expected)


def refused(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)


if __name__ == "__main__":
    main()
