"""`chunked`: a function of a whole batch, run one micro-batch at a time, and once more when its gradient is needed.

A loss that compares the examples of a batch needs all of their outputs, and no micro-batch has them. So the function
runs piece by piece, its outputs are joined, and the loss sees the whole batch. Each piece keeps its inputs only
(`jax.checkpoint`) and runs again in the backward pass. In memory are the inputs, the outputs and one piece. This is
GradCache (Gao et al. 2021, arXiv:2101.06983) as a pure function.
"""

import functools
import logging
import sys
import time as clock
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bigbatch import errors
from bigbatch.engines.jax_estimate import ENOUGH, TRIES, bytes_of, device_memory, needs_of
from bigbatch.jax.batch import Batch, check_in_axes
from bigbatch.jax.checks import check_dtype, widened
from bigbatch.plan import budget, choose, log_choice

logger = logging.getLogger("bigbatch.jax")


def chunked(
    function: Callable[..., Any],
    *,
    micro_batch: int | Literal["auto"],
    in_axes: Sequence[Any] = (None, 0),
    keep: int | Literal["auto"] = 0,
    dtype: Any = jnp.float32,
) -> Callable[..., Any]:
    """A function with the same values and gradients that holds the activations of `micro_batch` examples at a time.

    An example's output must depend on that example only; the loss that follows may compare them all::

        encode = bb.chunked(model, micro_batch=32)

        def loss_fn(params, images, texts):  # 4,096 pairs, 32 in memory
            return info_nce(encode(params["images"], images), encode(params["texts"], texts))

    It is a pure function, under `jit`, `grad`, `vmap` and `shard_map`, and may be differentiated again. It takes one
    more forward pass than `function`. Typed PRNG keys in arguments that are given whole are folded with the number of
    the piece, as `value_and_grad` does, so each piece draws its own randomness, the same in both runs.

    Args:
        function: a pure function of arrays. Arrays that it closes over are differentiated too, but their gradients add
            up in the arrays' own dtype: pass parameters as arguments.
        micro_batch: examples in memory at once; the last piece may be shorter. "auto" compiles the forward and backward
            pass of a piece for a few sizes, and takes the largest that fits what is free now.
        in_axes: for each positional argument the axis that holds its examples, or None for an argument that every piece
            gets whole; nested like the argument, as for `jax.vmap`. Keyword arguments are given whole.
        keep: how many pieces keep their activations, so that these do not run again: the last ones. "auto" keeps as
            many as fit what is free now.
        dtype: the narrowest dtype in which the gradients of whole arguments add up over the pieces. None for their own.

    Returns:
        A function with the arguments of `function`. Its outputs are nested as `function`'s are, joined along their
        leading dimension in the batch's order.

    Raises:
        TypeError, ValueError: an option is not as described; or, when called, an argument or an output.
    """
    if not callable(function):
        raise TypeError(f"function must be a function. {errors.received('function', function)}")
    if not (isinstance(micro_batch, str) and micro_batch == "auto"):
        micro_batch = errors.check_micro_batch(micro_batch)
    errors.check_keep(keep, auto=True)
    check_in_axes(in_axes)
    check_dtype(dtype)

    sizes: dict[Any, int] = {}

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        size = micro_batch
        if size == "auto":
            leaves, tree = jax.tree.flatten((args, kwargs))
            key = tree, *(jax.typeof(x) if isinstance(x, jax.Array | np.ndarray) else repr(x) for x in leaves)
            if key not in sizes:
                sizes[key] = _planned(_Pieces(function, Batch(function, args, kwargs, in_axes, sys.maxsize), dtype))
            size = sizes[key]
        batch = Batch(function, args, kwargs, in_axes, size)
        return function(*args, **kwargs) if batch.count == 1 else _Pieces(function, batch, dtype).outputs(keep)

    return run


class _Pieces:
    """One call's pieces. Whole arguments in 16 bits are widened outside, so that their gradients add up wide."""

    def __init__(self, function: Callable[..., Any], batch: Batch, dtype: Any):
        self.function, self.batch = function, batch
        self.whole = [_wide(leaf.value, dtype) for leaf in batch.leaves if leaf.axis is None]

    def run(self, whole: Sequence[Any], i: Any, cut: Sequence[Any]) -> Any:
        """Piece i, of the leaves that it gets whole and those that are cut."""
        of = iter(whole), iter(cut)
        leaves = [
            _narrowed(next(of[0]), leaf.value) if leaf.axis is None else next(of[1]) for leaf in self.batch.leaves
        ]
        args, kwargs = self.batch.nested(leaves, i)
        outputs = self.function(*args, **kwargs)
        length = cut[0].shape[next(leaf.axis for leaf in self.batch.leaves if leaf.axis is not None)]
        for path, value in jax.tree_util.tree_leaves_with_path(outputs):
            if not hasattr(value, "shape") or not value.shape or value.shape[0] != length:
                raise errors.output_without_length(f"output{jax.tree_util.keystr(path)}", value, length)
        return outputs

    def outputs(self, keep: int | Literal["auto"]) -> Any:
        """The outputs of all pieces, joined in the batch's order."""
        batch, once = self.batch, functools.partial(self.run, self.whole)
        keep = self.kept() if keep == "auto" else keep
        of_full = max(
            0, batch.full - max(0, keep - (batch.remainder > 0))
        )  # that run again; the last piece is kept first
        stacked, parts = batch.stacked(), []
        for run, start, stop in ((jax.checkpoint(once, prevent_cse=False), 0, of_full), (once, of_full, batch.full)):
            if start < stop:
                xs = jnp.arange(start, stop), [x[start:stop] for x in stacked]
                parts.append(lax.scan(lambda _, x, run=run: (None, run(*x)), None, xs)[1])
        full = jax.tree.map(lambda *xs: xs[0] if len(xs) == 1 else jnp.concatenate(xs), *parts)
        if not batch.remainder:
            return jax.tree.map(lambda x: batch.unstride(x, None), full)
        return jax.tree.map(
            batch.unstride, full, (once if keep else jax.checkpoint(once))(batch.full, batch.remaining())
        )

    def kept(self) -> int:
        """How many pieces' activations fit what is free."""
        size, half = self.batch.size, self.batch.size // 2

        def residuals(examples: int) -> int:
            return bytes_of(jax.eval_shape(lambda *given: self.vjp(*given)[1], self.variables(), self.cut(examples)))

        # Of two sizes, so that what a piece keeps of whole arguments, which are there already, does not count.
        each = (residuals(size) - (residuals(half) if half else 0)) / (size - half)
        return int(budget(None, device_memory()).headroom / max(1.0, each * size))

    def needs(self, examples: int) -> int:
        """The bytes that the forward and backward pass of a piece takes, by the compiler's memory analysis."""

        def both(whole: list[Any], cut: list[Any]) -> Any:
            outputs, backward = self.vjp(whole, cut)
            return backward(outputs)

        return needs_of(jax.jit(both).trace(self.variables(), self.cut(examples)))

    def vjp(self, whole: list[Any], cut: list[Any]) -> Any:
        """A piece's floating outputs, and the function from their gradients to those of whole arguments and inputs."""
        given = [_is_floating(x) for x in cut]

        def piece(whole: list[Any], floating: list[Any]) -> list[Any]:
            variables, inputs = iter(whole), iter(floating)
            everything = [next(variables) if _is_floating(x) else x for x in self.whole]
            outputs = self.run(
                everything, 0, [next(inputs) if is_floating else x for x, is_floating in zip(cut, given, strict=True)]
            )
            return [y for y in jax.tree.leaves(outputs) if _is_floating(y)]

        return jax.vjp(piece, whole, [x for x, is_floating in zip(cut, given, strict=True) if is_floating])

    def variables(self) -> list[Any]:
        """The whole arguments that have gradients."""
        return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.whole if _is_floating(x)]

    def cut(self, examples: int) -> list[Any]:
        """What a piece of so many examples gets of the leaves that are cut."""
        cut = [(leaf.value, leaf.axis) for leaf in self.batch.leaves if leaf.axis is not None]
        return [jax.ShapeDtypeStruct((*x.shape[:axis], examples, *x.shape[axis + 1 :]), x.dtype) for x, axis in cut]


def _planned(pieces: _Pieces) -> int:
    """The largest micro-batch whose forward and backward pass fit what is free, beside all outputs and gradients."""
    started, length = clock.perf_counter(), pieces.batch.length
    outputs = jax.eval_shape(lambda cut: pieces.run(pieces.whole, 0, cut), pieces.cut(length))
    kept = 2 * bytes_of(outputs) + bytes_of(pieces.cut(length)) + bytes_of(pieces.variables())
    memory = device_memory()
    allowed = budget(None, memory._replace(free=max(0, memory.free - kept)))
    how = "by the compiler's memory analysis, beside all outputs and gradients"
    plan = choose(pieces.needs, length, allowed, lambda: how, tries=TRIES, enough=ENOUGH)
    log_choice(logger, plan, started)
    return plan.micro_batch


def _is_floating(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.inexact)


def _wide(value: Any, dtype: Any) -> Any:
    return value.astype(widened(value.dtype, dtype)) if _is_floating(value) else value


def _narrowed(value: Any, like: Any) -> Any:
    return value.astype(like.dtype) if _is_floating(value) else value
