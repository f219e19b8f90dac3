"""A call's arguments as micro-batches: which leaves are cut along which axis, and what micro-batch i is given."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigbatch import errors
from bigbatch.jax.checks import check_parameter


class Leaf(NamedTuple):
    """A leaf of the arguments."""

    value: Any
    axis: int | None  # that holds the examples; None where every micro-batch gets it whole
    where: str  # its name in errors, `batch['x']`
    argnum: int | None  # the positional argument that it belongs to; None in a keyword argument


class Batch:
    """The arguments of one call, cut into micro-batches.

    Examples are strided: of N full micro-batches, number i gets examples i, i + N, i + 2N, … A batch whose examples are
    spread over devices stays where it is that way, for each device holds a part of every micro-batch. The examples that
    do not fill a micro-batch make a shorter one at the end.

    Attributes:
        size: examples in a full micro-batch.
        full: the number of full micro-batches.
        remainder: examples in the shorter one at the end; 0 where there is none.
        count: the number of all micro-batches.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_axes: Sequence[Any],
        micro_batch: int,
    ):
        self.args, self.kwargs = args, kwargs
        self.tree = jax.tree.structure((args, kwargs))
        self.leaves = [*_leaves(loss_fn, args, in_axes), *_whole(kwargs)]
        lengths = [(leaf.where, leaf.value.shape[leaf.axis]) for leaf in self.leaves if leaf.axis is not None]
        self.length = errors.check_lengths(lengths)
        self.size = min(micro_batch, self.length)
        self.full, self.remainder = divmod(self.length, self.size)
        self.count = self.full + (self.remainder > 0)
        self._strided = self._stride() if self.count > 1 else []  # here, so that it is done outside the loop's trace

    @property
    def axes(self) -> list[int | None]:
        """For each leaf of (args, kwargs) the axis that holds its examples."""
        return [leaf.axis for leaf in self.leaves]

    def check_whole(self, option: str, argnums: Sequence[int]) -> None:
        """Refuses numbers of positional arguments that do not exist or are cut."""
        for k in argnums:
            if not 0 <= k < len(self.args):
                raise ValueError(
                    f"{option} must be the number of a positional argument. "
                    f"Received: {option}={k} for {len(self.args)} positional arguments."
                )
            if any(leaf.argnum == k and leaf.axis is not None for leaf in self.leaves):
                raise ValueError(
                    f"An argument of {option} goes whole to every micro-batch. "
                    f"Received: {option}={k}, which in_axes cuts. Say None for it in in_axes."
                )

    def check_parameters(self, argnums: Sequence[int]) -> None:
        """Refuses arguments that cannot be differentiated."""
        self.check_whole("argnums", argnums)
        for leaf in self.leaves:
            if leaf.argnum in argnums:
                check_parameter(leaf.value, leaf.where, floating=True)

    def lengths(self) -> jax.Array:
        """The number of examples in each micro-batch."""
        return jnp.asarray([self.size] * self.full + [self.remainder] * (self.remainder > 0))

    def _stride(self) -> list[Any]:
        """The leaves reshaped from (…, examples, …) to (…, size, full, …), which moves no data."""

        def reshape(x: jax.Array, axis: int) -> jax.Array:
            if self.remainder:
                x = lax.slice_in_dim(x, 0, self.size * self.full, axis=axis)
            spec = _spec(x)
            shape = *x.shape[:axis], self.size, self.full, *x.shape[axis + 1 :]
            return _reshaped(x, shape, spec and (*spec[: axis + 1], None, *spec[axis + 1 :]))

        return [leaf.value if leaf.axis is None else reshape(leaf.value, leaf.axis) for leaf in self.leaves]

    def micro_batch(self, i: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of full micro-batch i, which may be traced; the call's own where there is only one."""
        if self.count == 1:
            return self.args, self.kwargs

        return self.nested(
            [
                x if leaf.axis is None else lax.dynamic_index_in_dim(x, i, leaf.axis + 1, keepdims=False)
                for leaf, x in zip(self.leaves, self._strided, strict=True)
            ],
            i,
        )

    def last_micro_batch(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the shorter micro-batch at the end."""
        cut = iter(self.remaining())
        return self.nested([leaf.value if leaf.axis is None else next(cut) for leaf in self.leaves], self.full)

    def stacked(self) -> list[Any]:
        """The leaves that are cut, of all full micro-batches: number i is [i] of each, for a `lax.scan` over them."""
        cut = [(x, leaf.axis) for leaf, x in zip(self.leaves, self._strided, strict=True) if leaf.axis is not None]
        return [jnp.moveaxis(x, axis + 1, 0) for x, axis in cut]

    def remaining(self) -> list[Any]:
        """The leaves that are cut, of the shorter micro-batch at the end."""
        cut = [(leaf.value, leaf.axis) for leaf in self.leaves if leaf.axis is not None]
        return [lax.slice_in_dim(x, self.size * self.full, self.length, axis=axis) for x, axis in cut]

    def nested(self, leaves: Sequence[Any], i: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Micro-batch i's arguments, of these leaves; keys that it gets whole are folded."""
        return self.tree.unflatten(
            _folded(x, i) if leaf.axis is None else x for leaf, x in zip(self.leaves, leaves, strict=True)
        )

    def unstride(self, full: jax.Array, last: jax.Array | None) -> jax.Array:
        """(full, size, …) and (remainder, …) → (examples, …), in the batch's own order."""
        joined = full.swapaxes(0, 1)
        spec = _spec(joined)
        shape = self.full * self.size, *full.shape[2:]
        joined = _reshaped(joined, shape, spec and (spec[0], *spec[2:]))
        return joined if last is None else jnp.concatenate([joined, last])


def _spec(x: jax.Array) -> tuple[Any, ...] | None:
    """An array's layout on a mesh with explicit axes, where JAX asks for the reshaped array's layout too; else None."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec if any(part is not None for part in spec) else None


def _reshaped(x: jax.Array, shape: tuple[int, ...], spec: tuple[Any, ...] | None) -> jax.Array:
    if spec is None:
        return x.reshape(shape)
    return x.reshape(shape, out_sharding=NamedSharding(jax.typeof(x).sharding.mesh, P(*spec)))


def check_in_axes(in_axes: Any) -> None:
    """Accepts a tuple or a list."""
    if not isinstance(in_axes, tuple | list):
        raise TypeError(
            "in_axes must be a tuple with one entry for each positional argument: the axis that holds its examples, "
            f"or None. {errors.received('in_axes', in_axes)} The default, (None, 0), is parameters and a batch."
        )


def _whole(kwargs: dict[str, Any]) -> list[Leaf]:
    """The leaves of keyword arguments, which every micro-batch gets whole."""
    paths = jax.tree_util.tree_leaves_with_path(kwargs)
    return [_leaf(value, None, f"{path[0].key}{jax.tree_util.keystr(path[1:])}", None) for path, value in paths]


def _leaves(loss_fn: Any, args: tuple[Any, ...], in_axes: Sequence[Any]) -> list[Leaf]:
    if len(in_axes) != len(args):
        raise ValueError(
            "in_axes must have one entry for each positional argument: the axis that holds its examples, or None. "
            f"Received: in_axes={in_axes} for {len(args)} positional arguments."
        )
    leaves = []
    for k, (name, arg, axes) in enumerate(zip(_names(loss_fn, len(args)), args, in_axes, strict=True)):
        paths = jax.tree_util.tree_leaves_with_path(arg)
        for (path, value), axis in zip(paths, _broadcast(axes, arg, name), strict=True):
            leaves.append(_leaf(value, axis, name + jax.tree_util.keystr(path), k))
    return leaves


def _broadcast(axes: Any, arg: Any, name: str) -> list[int | None]:
    """The axis of every leaf of an argument."""
    if axes is None or isinstance(axes, int):
        return [axes] * len(jax.tree.leaves(arg))
    is_none = lambda x: x is None  # noqa: E731
    try:
        spread = jax.tree.map(lambda axis, part: [axis] * len(jax.tree.leaves(part)), axes, arg, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(f"in_axes must be nested as the arguments are. Received: {axes} for {name}.") from error
    return jax.tree.leaves(spread, is_leaf=is_none)


def _leaf(value: Any, axis: Any, where: str, argnum: int | None) -> Leaf:
    if axis is None:
        if _is_raw_key(value):
            raise TypeError(
                f"A raw PRNG key cannot be told from data, and every micro-batch would draw the same. "
                f"{errors.received(where, value)} Pass jax.random.key(seed), or jax.random.wrap_key_data of it."
            )
        return Leaf(value, None, where, argnum)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise TypeError(f"An entry of in_axes must be an integer or None. {errors.received(where, axis)}")
    if isinstance(value, str | bytes) or (isinstance(value, np.ndarray) and value.dtype.kind in "OSUT"):
        raise TypeError(
            "Text cannot be cut: JAX traces loss_fn once for all micro-batches, and traces arrays of numbers only. "
            f"{errors.received(where, value)} Encode it before the call, as an array of token ids or of indices; "
            "or leave it out of the batch."
        )
    if not isinstance(value, jax.Array | np.ndarray) or value.ndim == 0:
        raise errors.leaf_without_length(where, value)
    if not -value.ndim <= axis < value.ndim:
        raise ValueError(f"in_axes must name an axis of the leaf. {errors.received(where, value)} Its axis is {axis}.")
    return Leaf(jnp.asarray(value), axis % value.ndim, where, argnum)


def _is_raw_key(value: Any) -> bool:
    if not isinstance(value, jax.Array | np.ndarray) or value.dtype != jnp.uint32:
        return False
    shape = jax.eval_shape(jax.random.PRNGKey, 0).shape
    return value.shape[-len(shape) :] == shape  # one key, or several


def _names(loss_fn: Any, count: int) -> list[str]:
    """The names of the arguments in loss_fn, for errors."""
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [*names[:count], *(f"args[{i}]" for i in range(len(names), count))]


def _folded(value: Any, i: Any) -> Any:
    """A PRNG key folded with i, so that each micro-batch draws its own; anything else as it is."""
    if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    keys = jax.vmap(jax.random.fold_in, (0, None))(value.reshape(-1), i)
    return keys.reshape(value.shape)
