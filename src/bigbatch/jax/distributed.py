"""A batch whose examples are spread over devices: what each does by itself, and the one reduction at the end."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bigbatch import errors


def are_bound(names: Sequence[str]) -> bool:
    """Whether the program runs once for each place along these axes, as inside `shard_map`."""
    try:
        for name in names:
            lax.axis_size(name)
    except NameError:
        return False
    return True


def spread(tree: Any, names: Sequence[str]) -> Any:
    """The same values as each device's own: no gradient of theirs is summed over devices before we say so.

    A PRNG key is folded with the device's place, so that no two draw the same.
    """
    if not names:
        return tree
    place = lax.axis_index(tuple(names))

    def own(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.vmap(jax.random.fold_in, (0, None))(x.reshape(-1), place).reshape(x.shape)
        missing = _varying(place) - _varying(x)
        return lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(own, tree)


def _varying(x: jax.Array) -> frozenset[str]:
    """The axes along which JAX knows a value to differ; none with `check_vma=False`; tests/jax/test_private.py."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def summed(tree: Any, names: Sequence[str]) -> Any:
    """The sum over the devices."""
    return lax.psum(tree, tuple(names)) if names else tree


def averaged(tree: Any, names: Sequence[str]) -> Any:
    """The mean over the devices of what is not whole numbers, and the largest of what is."""

    def average(x: jax.Array) -> jax.Array:
        return lax.pmean(x, tuple(names)) if jnp.issubdtype(x.dtype, jnp.inexact) else lax.pmax(x, tuple(names))

    return jax.tree.map(average, tree) if names else tree


def by_device(
    function: Callable[..., Any],
    args: Any,
    axes: Sequence[int | None],
    names: tuple[str, ...],
    micro_batch: int,
    out_specs: Any,
) -> Any:
    """Calls `function(args, micro_batch)` on every device with its own part of the batch.

    Args:
        function: takes arguments nested as `args` are.
        args: the arguments; leaves that are not arrays are passed as they are.
        axes: for each leaf of `args` the axis that holds its examples, or None.
        names: axes of the mesh in scope.
        micro_batch: of all devices together.
        out_specs: of what `function` returns, as for `shard_map`.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    if not set(names) <= set(shape):
        raise ValueError(
            "axis_name must be an axis of shard_map, vmap or pmap around the call, or of the mesh in scope. "
            f"Received: axis_name={names} with a mesh of {dict(shape)}. Call it under jax.set_mesh(mesh)."
        )
    count = math.prod(shape[name] for name in names)
    leaves, treedef = jax.tree.flatten(args)
    leaves = [_placed(leaf, axis, names) for leaf, axis in zip(leaves, axes, strict=True)]
    for what, size in [("micro_batch", micro_batch), *(("the batch", x.shape[a]) for x, a in _cut(leaves, axes))]:
        if size % count:
            raise ValueError(
                f"Each device takes the same part of a micro-batch. Received: {what} of {size} over {count} devices. "
                f"Pass a multiple of {count}; pad the batch, and give the padding no items."
            )
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    specs = [P() if axis is None else P(*[None] * axis, names) for axis in axes]

    def local(*arrays: Any) -> Any:
        given = iter(arrays)
        return function(
            treedef.unflatten(next(given) if a else leaf for a, leaf in zip(is_array, leaves, strict=True)),
            micro_batch // count,
        )

    return jax.shard_map(
        local,
        in_specs=tuple(spec for spec, a in zip(specs, is_array, strict=True) if a),
        out_specs=out_specs,
        axis_names=set(names),
    )(*(leaf for leaf, a in zip(leaves, is_array, strict=True) if a))


def check_same(params: Any, names: Sequence[str]) -> None:
    """Refuses parameters that JAX knows to differ along the axes: their gradients would be added up as one array's."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if isinstance(leaf, jax.Array) and _varying(leaf) & set(names):
            raise ValueError(
                "Parameters must be the same along axis_name. "
                f"{errors.received(f'parameters{jax.tree_util.keystr(path)}', leaf)} "
                f"It differs along {sorted(_varying(leaf) & set(names))}. Pass it whole, with P() in in_specs; or call "
                "this outside of shard_map under jax.set_mesh(mesh), where parameters are gathered, and gradients laid "
                "out as they are."
            )


def placed_as(params: Any, grads: Any, names: Sequence[str]) -> Any:
    """The gradients, each laid out as its parameter, where that lies on these axes."""

    def place(param: Any, grad: jax.Array) -> jax.Array:
        if not names or not isinstance(param, jax.Array):
            return grad
        spec = _spec(param)
        if any(set(_axes(entry)) & set(names) for entry in spec):
            return jax.sharding.reshard(grad, P(*spec))
        sharding = None if isinstance(param, Tracer) else param.sharding
        if isinstance(sharding, NamedSharding) and any(set(_axes(entry)) & set(names) for entry in sharding.spec):
            return jax.device_put(grad, sharding)  # on a mesh of automatic axes, where the type does not tell
        return grad

    return jax.tree.map(place, params, grads)


def _placed(x: Any, axis: int | None, names: tuple[str, ...]) -> Any:
    """An argument as `shard_map` wants it on explicit axes: cut along its examples, and not along another axis."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if not isinstance(x, jax.Array | np.ndarray) or all(kinds[name] != AxisType.Explicit for name in names):
        return x
    spec = [tuple(name for name in _axes(entry) if name not in names) for entry in _spec(x)]
    if axis is not None:
        spec[axis] = (*names, *spec[axis])
    return x if spec == [_axes(entry) for entry in _spec(x)] else jax.sharding.reshard(x, P(*spec))


def _spec(x: Any) -> list[Any]:
    """How an array's type says that it lies on explicit axes, for each of its dimensions."""
    spec = list(jax.typeof(x).sharding.spec)
    return spec + [None] * (np.ndim(x) - len(spec))


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _cut(leaves: Sequence[Any], axes: Sequence[int | None]) -> list[tuple[Any, int]]:
    return [(leaf, axis) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]
