"""One window: the sum Σ nᵢ·gᵢ over a batch's micro-batches, and the mean gradient.

`sum_gradients` is the plain loop. On a CPU `bigbatch.fused.jax` has a faster twin of it; without that folder the plain
loop does everything.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from bigbatch.jax.aux_outputs import Aux, finish, stack
from bigbatch.jax.batch import Batch, check_in_axes
from bigbatch.jax.checks import check_argnums, check_dtype, widened
from bigbatch.jax.distributed import are_bound, averaged, by_device, check_same, placed_as, spread, summed
from bigbatch.jax.terms import Terms, as_terms, split_aux

try:
    from bigbatch.fused import jax as fused
except ModuleNotFoundError:  # the folder was left out
    fused = None


def sum_gradients(micro: Callable[..., Any], zeros: Any, state: Any, xs: Any) -> tuple[Any, Any, Any]:
    """Σ nᵢ·gᵢ over the micro-batches, by a `lax.scan` that carries the sums.

    Args:
        micro: (state, x) → ((gradients, items), state, y): one micro-batch's mean gradient, and the items it is the
            mean of, a scalar; None for 1.
        zeros: what the sums begin with, nested as the gradients are.
        state: what one micro-batch passes to the next.
        xs: what the micro-batches are given, along the leading dimension.

    Returns:
        The sums, the last state, and the ys, stacked.
    """
    if fused is not None and fused.applies():
        return fused.scan(micro, zeros, state, xs)

    def body(carry: Any, x: Any) -> Any:
        sums, state = carry
        (grads, items), state, y = micro(state, x)
        return (jax.tree.map(functools.partial(add, items), sums, grads), state), y

    (sums, state), ys = lax.scan(body, (zeros, state), xs)
    return sums, state, ys


def add(items: Any, total: jax.Array, grad: jax.Array) -> jax.Array:
    """Total + items·grad. A mean over no items is 0/0; it counts for nothing, and 0 × NaN would be NaN."""
    if items is None:
        return total + grad.astype(total.dtype)
    items = jnp.asarray(items, total.dtype)
    return total + jnp.where(items == 0, 0, items * grad.astype(total.dtype))


class Options(NamedTuple):
    """The arguments of the public `value_and_grad`, but for the micro-batch."""

    loss_fn: Callable[..., Any]
    argnums: int | Sequence[int]
    has_aux: bool
    has_items: bool
    in_axes: Sequence[Any]
    aux: Any  # an Aux, once checked
    dtype: Any
    names: Any  # of the axes that examples are spread over; a tuple, once checked

    def checked(self) -> "Options":
        """Refuses what is wrong with them."""
        check_in_axes(self.in_axes)
        check_dtype(self.dtype)
        check_argnums(self.argnums)
        if self.has_aux != (self.aux is not None):
            raise ValueError(
                "aux says what becomes of the auxiliary outputs, and has_aux that there are some. "
                f"Received: has_aux={self.has_aux}, aux={self.aux!r}. "
                "Pass both or neither; aux is 'mean', 'sum', 'concatenate' or carry(k)."
            )
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        return self._replace(aux=Aux(self.aux), names=names)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The arguments to differentiate."""
        return (self.argnums,) if isinstance(self.argnums, int) else tuple(self.argnums)

    def parameters(self, args: Sequence[Any]) -> Any:
        """The arguments to differentiate, nested as their gradients are."""
        return args[self.argnums] if isinstance(self.argnums, int) else tuple(args[k] for k in self.argnums)

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], micro_batch: int) -> Batch:
        """A call's arguments as micro-batches."""
        return Batch(self.loss_fn, args, kwargs, self.in_axes, micro_batch)

    def run(self, args: Any, kwargs: Any, share: float) -> tuple[Terms, Any]:
        """The loss function's terms and auxiliary outputs; `share` is what a loss without items counts for."""
        result = self.loss_fn(*args, **kwargs)
        loss, outputs = split_aux(result) if self.has_aux else (result, None)
        return as_terms(loss, share, self.has_items), outputs

    def differentiate(self, args: Any, kwargs: Any, share: float, total: Callable[[Terms], Any]) -> tuple[Any, ...]:
        """The gradient of `total` of the terms; the terms; and the auxiliary outputs."""

        def scalar(*args: Any) -> tuple[Any, Any]:
            terms, outputs = self.run(args, kwargs, share)
            return total(terms), (terms, outputs)

        (_, (terms, outputs)), grads = jax.value_and_grad(scalar, self.argnums, has_aux=True)(*args)
        return grads, terms, outputs


def value_and_grad(options: Options, micro_batch: int) -> Callable[..., tuple[Any, Any]]:
    """The public `value_and_grad`'s function, for a number as its micro-batch."""

    def local(given: Any, micro_batch: int) -> tuple[Any, Any]:
        args, kwargs = spread(given, options.names)
        return _window(options, options.batch(args, kwargs, micro_batch))

    @functools.wraps(options.loss_fn)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        names = options.names
        if not names:
            return _window(options, options.batch(args, kwargs, micro_batch))
        if are_bound(names):
            check_same([args[k] for k in options.numbers if k < len(args)], names)
            return local((args, kwargs), micro_batch)
        batch = options.batch(args, kwargs, micro_batch)
        batch.check_parameters(options.numbers)
        specs = (P(), options.aux.specs(P(names))) if options.has_aux else P()
        result, grads = by_device(local, (args, kwargs), batch.axes, names, micro_batch, (specs, P()))
        return result, placed_as(options.parameters(args), grads, names)

    return wrapped


def _window(options: Options, batch: Batch) -> tuple[Any, Any]:
    """The loss and the gradient of a batch, or of one device's part of it."""
    batch.check_parameters(options.numbers)
    batch.check_whole("carry", options.aux.argnums)
    if batch.count > 1 or options.names:
        return _of_micro_batches(options, batch)
    grads, terms, outputs = options.differentiate(*batch.micro_batch(0), 1, lambda terms: terms.total)
    loss = jax.tree.map(lambda loss: loss.astype(widened(loss.dtype, jnp.float32)), terms.losses)
    if options.has_items or terms.named:
        loss, grads = terms.poisoned((loss, grads))
    return ((loss, outputs) if options.has_aux else loss), grads


def _of_micro_batches(options: Options, batch: Batch) -> tuple[Any, Any]:
    aux, names, params = options.aux, options.names, options.parameters(batch.args)
    named = jax.eval_shape(lambda: options.run(*batch.micro_batch(0), 1)[0]).named
    total = _by_shares(options, batch) if named else lambda terms: terms.total

    def micro(carried: Any, given: Any, examples: int) -> Any:
        args, kwargs = given
        args = tuple(carried.get(k, arg) for k, arg in enumerate(args))
        grads, terms, outputs = options.differentiate(args, kwargs, examples / batch.size, total)
        stacked, carried = aux.split(outputs)
        return (grads, None if named else terms.items), carried, (terms, stacked)

    sums, carried, (terms, stacked) = sum_gradients(
        lambda carried, i: micro(carried, batch.micro_batch(i), batch.size),
        jax.tree.map(lambda p: jnp.zeros_like(p, widened(jnp.result_type(p), options.dtype)), params),
        {k: batch.args[k] for k in aux.argnums},
        jnp.arange(batch.full),
    )
    last = [None] * len(stacked)
    if batch.remainder:
        (grads, items), carried, (terms_of_last, last) = micro(carried, batch.last_micro_batch(), batch.remainder)
        sums = jax.tree.map(functools.partial(add, items), sums, grads)
        terms = jax.tree.map(stack, terms, terms_of_last)

    count = batch.count if named else summed(terms.items.sum(), names)
    # Times the inverse: XLA fuses a product into the optimizer's passes over the gradients, and a quotient not.
    factor = 1 / count
    grads = jax.tree.map(
        lambda s, p: (s * jnp.asarray(factor, s.dtype)).astype(jnp.result_type(p)), summed(sums, names), params
    )
    loss = terms.means(names)
    if not options.has_aux:
        return loss, grads
    items = batch.lengths() if named else terms.items

    def joined(rule: str, full: Any, last: Any) -> Any:
        return finish(rule, full, last, items, batch, names)

    return (loss, aux.join(stacked, last, averaged(carried, names), joined)), grads


def _by_shares(options: Options, batch: Batch) -> Callable[[Terms], Any]:
    """What to differentiate of named terms: each by its share of its own items, which must be known before the loop.

    The loss function runs once more for its items. Where these depend on the batch only, the compiler leaves the
    model out of that pass.
    """

    def items(given: Any, examples: int) -> Any:
        args, kwargs = given
        return options.run(args, kwargs, examples / batch.size)[0].items

    counted = lax.map(lambda i: items(batch.micro_batch(i), batch.size), jnp.arange(batch.full))
    if batch.remainder:
        counted = jax.tree.map(stack, counted, items(batch.last_micro_batch(), batch.remainder))
    totals = summed({name: n.sum() for name, n in counted.items()}, options.names)
    return lambda terms: terms.weighted(totals, batch.count)
