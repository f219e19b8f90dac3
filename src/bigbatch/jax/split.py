"""The split API: you hold the batch, and bigbatch stands where JAX takes a gradient."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from bigbatch import errors
from bigbatch.fused import jax_deferred
from bigbatch.jax.aux_outputs import Aux, finish, stack
from bigbatch.jax.batch import Batch, check_in_axes
from bigbatch.jax.distributed import are_bound, averaged, by_device, check_same, placed_as, spread, summed
from bigbatch.jax.terms import Terms, as_terms, split_aux
from bigbatch.jax.window import check_dtype, widened


def value_and_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    *,
    has_items: bool = False,
    micro_batch: int | Literal["auto"],
    in_axes: Sequence[Any] = (None, 0),
    aux: Any = None,
    dtype: Any = jnp.float32,
    axis_name: str | Sequence[str] = (),
) -> Callable[..., tuple[Any, Any]]:
    """A function of the whole batch's mean loss and its gradient, with one micro-batch in memory at a time.

    It takes the place of `jax.value_and_grad`, and is used under `jax.jit` in the same way::

        loss, grads = bb.value_and_grad(loss_fn, micro_batch=32)(params, batch)

    The loop is one `lax.scan`. Micro-batch i of N gets examples i, i + N, i + 2N, …, which leaves a batch that is
    sharded along its examples where it is; what does not fill a micro-batch is a shorter one at the end. A batch that
    fits into one micro-batch is given to `jax.value_and_grad` as it is.

    Args:
        loss_fn: returns the mean loss of the micro-batch it is given, a real scalar; or, with `has_items`,
            `(loss, items)`; or several terms by name, `{"language": (loss, tokens), "router": (loss, 1)}`, each with
            what it is the mean of, whose sum is differentiated. Items are positive; 0 in an array counts for nothing,
            so that a padded batch may hold micro-batches of padding alone. An array that cannot be read while tracing,
            and holds negative, infinite or NaN items, makes the loss and the gradients NaN. Of a named term, items
            may depend on the batch only.
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
        aux: "mean" over items, "sum", "concatenate" in the batch's own order, or `bb.carry(k)`: the micro-batch
            after gets it as argument k. One for all, or a nesting of them as the outputs are.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 parameters add up in float32
            and are rounded once, at the end. None adds up in the parameters' own dtype.
        axis_name: the axis or axes that the examples are spread over: of the `shard_map`, `vmap` or `pmap` around the
            call, where `micro_batch` counts one device's examples; or of the mesh in scope (`jax.set_mesh`), where it
            counts all devices', and parameters that lie on these axes are gathered once and get gradients that lie
            as they do. Losses and gradients are the means over all devices' items, reduced once, after
            the loop. `loss_fn` sees one device's part of a micro-batch.

    Returns:
        A function with the arguments of `loss_fn` that returns `(loss, grads)`, or `((loss, aux), grads)`. The loss is
        the mean over all items in at least float32; of named terms, a dict of their means. Gradients have the
        parameters' dtypes.

    Raises:
        TypeError, ValueError: an argument, the batch, a loss or its items are not as described; while tracing.
    """
    if isinstance(micro_batch, str) and micro_batch == "auto":
        from bigbatch.jax.plan import fitting  # which compiles this function

        options = {"has_items": has_items, "in_axes": in_axes, "aux": aux, "dtype": dtype, "axis_name": axis_name}
        return fitting(loss_fn, argnums, has_aux, holomorphic, **options)
    micro_batch = errors.check_micro_batch(micro_batch)
    check_in_axes(in_axes)
    check_dtype(dtype)
    _check_argnums(argnums)
    if holomorphic:
        raise ValueError("Holomorphic gradients are not accumulated. Received: holomorphic=True. Leave it out.")
    if has_aux != (aux is not None):
        raise ValueError(
            "aux says what becomes of the auxiliary outputs, and has_aux that there are some. "
            f"Received: has_aux={has_aux}, aux={aux!r}. "
            "Pass both or neither; aux is 'mean', 'sum', 'concatenate' or carry(k)."
        )
    words = Aux(aux)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)

    def window(batch: Batch) -> tuple[Any, Any]:
        batch.check_parameters(_numbers(argnums))
        batch.check_whole("carry", words.argnums)
        args = batch.args
        params = args[argnums] if isinstance(argnums, int) else tuple(args[k] for k in argnums)

        def run(given: Any, examples: int) -> tuple[Terms, Any]:
            args, kwargs = given
            result = loss_fn(*args, **kwargs)
            loss, outputs = split_aux(result) if has_aux else (result, None)
            return as_terms(loss, examples / batch.size, has_items), outputs

        def differentiate(given: Any, examples: int, total: Callable[[Terms], Any]) -> tuple[Any, Terms, Any]:
            args, kwargs = given

            def scalar(*args: Any) -> tuple[Any, Any]:
                terms, outputs = run((args, kwargs), examples)
                return total(terms), (terms, outputs)

            (_, (terms, outputs)), grads = jax.value_and_grad(scalar, argnums, has_aux=True)(*args)
            return grads, terms, outputs

        if batch.count == 1 and not names:
            grads, terms, outputs = differentiate(batch.take(0), batch.size, _sum)
            loss = jax.tree.map(lambda loss: loss.astype(widened(loss.dtype, jnp.float32)), terms.losses)
            if has_items or terms.several:
                loss, grads = terms.poisoned((loss, grads))
            return ((loss, outputs) if has_aux else loss), grads

        several = jax.eval_shape(lambda: run(batch.take(0), batch.size)[0]).several
        total = _shared(batch, run, names) if several else _sum

        def micro(carried: Any, given: Any, examples: int) -> Any:
            args, kwargs = given
            args = tuple(carried.get(k, arg) for k, arg in enumerate(args))
            grads, terms, outputs = differentiate((args, kwargs), examples, total)
            kept, carried = words.split(outputs)
            return (grads, None if several else terms.items), carried, (terms, kept)

        sums, carried, (terms, kept) = jax_deferred.scan(
            lambda carried, i: micro(carried, batch.take(i), batch.size),
            jax.tree.map(lambda p: jnp.zeros_like(p, widened(jnp.result_type(p), dtype)), params),
            {k: args[k] for k in words.argnums},
            jnp.arange(batch.full),
        )
        rest = [None] * len(kept)
        if batch.rest:
            (grads, weight), carried, (last, rest) = micro(carried, batch.tail(), batch.rest)
            sums = jax.tree.map(functools.partial(_add, 1.0 if several else weight), sums, grads)
            terms = jax.tree.map(stack, terms, last)

        sums = summed(sums, names)
        count = batch.count if several else summed(terms.items.sum(), names)
        # Times the inverse: XLA fuses a product into the optimizer's passes over the gradients, and a quotient not.
        factor = 1 / count
        grads = jax.tree.map(lambda s, p: (s * jnp.asarray(factor, s.dtype)).astype(jnp.result_type(p)), sums, params)
        items = batch.examples() if several else terms.items
        outputs = words.join(
            kept, rest, averaged(carried, names), lambda word, *parts: finish(word, parts, items, batch, names)
        )
        loss = terms.means(names)
        return ((loss, outputs) if has_aux else loss), grads

    @functools.wraps(loss_fn)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        def local(given: Any, micro_batch: int) -> tuple[Any, Any]:
            args, kwargs = spread(given, names)
            return window(Batch(loss_fn, args, kwargs, in_axes, micro_batch))

        if are_bound(names):
            check_same([args[k] for k in _numbers(argnums) if k < len(args)], names)
            return local((args, kwargs), micro_batch)
        batch = Batch(loss_fn, args, kwargs, in_axes, micro_batch)
        batch.check_parameters(_numbers(argnums))
        specs = (P(), words.specs(P(names))) if has_aux else P()
        result, grads = by_device(local, (args, kwargs), batch.axes, names, micro_batch, (specs, P()))
        params = args[argnums] if isinstance(argnums, int) else tuple(args[k] for k in argnums)
        return result, placed_as(params, grads, names)

    return wrapped


def _numbers(argnums: int | Sequence[int]) -> tuple[int, ...]:
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def _check_argnums(argnums: Any) -> None:
    """Accepts an integer, or several that differ."""
    several = argnums if isinstance(argnums, tuple | list) else (argnums,)
    if not all(isinstance(k, int) and not isinstance(k, bool) for k in several):
        raise TypeError(f"argnums must be an integer, or a tuple of them. {errors.received('argnums', argnums)}")
    if not several or len(set(several)) < len(several):
        raise ValueError(
            f"argnums must name at least one argument, and each once. {errors.received('argnums', argnums)} "
            "Pass the number of the parameters' positional argument."
        )


def _add(weight: Any, total: jax.Array, grad: jax.Array) -> jax.Array:
    """Total + weight·grad. A mean over no items is 0/0; it counts for nothing, and 0 × NaN would be NaN."""
    weight = jnp.asarray(weight, total.dtype)
    return total + jnp.where(weight == 0, 0, weight * grad.astype(total.dtype))


def _sum(terms: Terms) -> Any:
    """What to differentiate of one loss, or of several terms that are the whole batch's."""
    return sum(terms.losses.values()) if terms.several else terms.losses


def _shared(batch: Batch, run: Callable[[Any, int], tuple[Terms, Any]], names: Any) -> Callable[[Terms], Any]:
    """What to differentiate of several terms: each by its share of its own items, which must be known beforehand.

    The loss function runs once more for its items. Where these depend on the batch only, the compiler leaves the
    model out of that pass.
    """

    def items(args: Any, examples: int) -> Any:
        return run(args, examples)[0].items

    counted = lax.map(lambda i: items(batch.take(i), batch.size), jnp.arange(batch.full))
    if batch.rest:
        counted = jax.tree.map(stack, counted, items(batch.tail(), batch.rest))
    totals = summed({name: n.sum() for name, n in counted.items()}, names)

    def total(terms: Terms) -> Any:
        # Times the count, which the sums are divided by at the end: a share of 1/4096 might underflow in float16.
        shares = {n: jnp.where(totals[n] == 0, 0, batch.count * i / totals[n]) for n, i in terms.items.items()}
        return sum(shares[name].astype(loss.dtype) * loss for name, loss in terms.losses.items())

    return total
