"""The split API: you hold the batch, and bigbatch stands where JAX takes a gradient."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from bigbatch import errors
from bigbatch.jax import window
from bigbatch.jax.aux_outputs import Rule
from bigbatch.jax.plan import with_planned_micro_batch


def value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    has_items: bool = False,
    micro_batch: int | Literal["auto"],
    in_axes: Sequence[Any] = (None, 0),
    aux: Rule | tuple[Any, ...] | list[Any] | dict[str, Any] | None = None,
    dtype: Any = jnp.float32,
    axis_name: str | Sequence[str] = (),
) -> Callable[..., tuple[Any, Any]]:
    """A function of the whole batch's mean loss and its gradient, with one micro-batch in memory at a time.

    It takes the place of `jax.value_and_grad`, and is used under `jax.jit` in the same way::

        loss, grads = bb.value_and_grad(loss_fn, micro_batch=32)(params, batch)

    The loop is one `lax.scan`. Micro-batch i of N gets examples i, i + N, i + 2N, …, which leaves a batch that is
    sharded along its examples where it is; the examples that do not fill a micro-batch make a shorter one at the end. A
    batch that fits into one micro-batch is given to `jax.value_and_grad` as it is.

    Args:
        loss_fn: returns the mean loss of the micro-batch it is given, a real scalar; or, with `has_items`,
            `(loss, items)`; or several terms by name, `{"language": (loss, tokens), "router": (loss, 1)}`, each with
            what it is the mean of. The sum of the terms is differentiated. Items are positive; 0 in an array counts
            for nothing, so that a padded batch may hold micro-batches of padding alone. Negative, infinite or NaN
            items in an array that cannot be read while tracing make the loss and the gradients NaN. The items of a
            named term may depend on the batch only.
        argnums: the positional arguments to differentiate, as in `jax.value_and_grad`.
        has_aux: whether `loss_fn` returns a pair, the second part being auxiliary outputs; `aux` says what becomes
            of them.
        holomorphic: refused.
        has_items: whether `loss_fn` returns `(loss, items)`, where the mean is over something other than examples,
            such as tokens. With `has_aux` too it returns `((loss, items), aux)`.
        micro_batch: examples in memory at once. Larger than the batch is fine: one micro-batch. "auto" plans one that
            fits what is free (see `plan`), once for each shape of the arguments, and logs what it chose.
        in_axes: for each positional argument the axis that holds its examples, or None where every micro-batch gets
            it whole; an integer, None, or a nesting of them, as in `jax.vmap`. Keyword arguments are given whole.
            PRNG keys (`jax.random.key`) in whatever is given whole are folded with the micro-batch's number.
        aux: "mean" over items, "sum", "concatenate" in the batch's own order, or `bb.carry(k)`: the next micro-batch
            gets it as argument k. One for all outputs, or a nesting of them as the outputs are.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 parameters add up in float32
            and are rounded once, at the end. None adds up in the parameters' own dtype.
        axis_name: the axis or axes that the examples are spread over: of the `shard_map`, `vmap` or `pmap` around the
            call, where `micro_batch` counts one device's examples; or of the mesh in scope (`jax.set_mesh`), where it
            counts all devices', and parameters that lie on these axes are gathered once and get gradients in the same
            layout. Losses and gradients are the means over all devices' items, reduced once, after the loop. `loss_fn`
            sees one device's part of a micro-batch.

    Returns:
        A function with the arguments of `loss_fn` that returns `(loss, grads)`, or `((loss, aux), grads)`. The loss is
        the mean over all items in at least float32; of named terms, a dict of their means. Gradients have the
        parameters' dtypes.

    Raises:
        TypeError, ValueError: an argument, the batch, a loss or its items are not as described; while tracing.
    """
    auto = isinstance(micro_batch, str) and micro_batch == "auto"
    size = 0 if auto else errors.check_micro_batch(micro_batch)
    options = window.Options(loss_fn, argnums, has_aux, has_items, in_axes, aux, dtype, axis_name).checked()
    if holomorphic:
        raise ValueError("Holomorphic gradients are not accumulated. Received: holomorphic=True. Leave it out.")
    return with_planned_micro_batch(options) if auto else window.value_and_grad(options, size)
