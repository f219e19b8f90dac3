"""What a loss function returns: one mean loss, alone or with its items, or several terms, each with its own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbatch import errors
from bigbatch.jax.checks import as_items, known_value
from bigbatch.jax.distributed import summed


class Terms(NamedTuple):
    """A micro-batch's mean losses and their items: scalars, or dicts of them by the terms' names.

    Of all micro-batches of a window, each scalar is an array with one entry a micro-batch.
    """

    losses: Any
    items: Any

    @property
    def named(self) -> bool:
        """Whether there are terms by name."""
        return isinstance(self.losses, dict)

    @property
    def total(self) -> Any:
        """The loss to differentiate where these are the whole batch's terms."""
        return sum(self.losses.values()) if self.named else self.losses

    def weighted(self, totals: Any, count: int) -> Any:
        """The loss to differentiate of one of `count` micro-batches: each named term by its share of its own items.

        Shares are multiplied by the count, by which the sums are divided at the end: 1/4096 might underflow in float16.
        """
        shares = {n: jnp.where(totals[n] == 0, 0, count * i / totals[n]) for n, i in self.items.items()}
        return sum(shares[name].astype(loss.dtype) * loss for name, loss in self.losses.items())

    def poisoned(self, tree: Any) -> Any:
        """The same arrays; all NaN where items that could not be read are bad, and so NaN (see `as_items`)."""
        unread = [items for items in jax.tree.leaves(self.items) if known_value(items) is None]
        if not unread:
            return tree
        poison = jnp.where(jnp.isnan(sum(unread)), jnp.nan, 0)
        return jax.tree.map(lambda x: x + poison.astype(x.dtype), tree)

    def means(self, names: Sequence[str]) -> Any:
        """Σ nᵢ·lossᵢ / Σ nᵢ of each term, over stacked micro-batches and the devices of these axes."""
        return jax.tree.map(lambda loss, items: weighted_mean(loss, items, names), self.losses, self.items)


def as_terms(value: Any, items: float, has_items: bool) -> Terms:
    """Accepts what `loss_fn` returned; `items` is what a loss counts for that comes without items of its own."""
    if has_items:
        if not (isinstance(value, tuple) and len(value) == 2):
            raise TypeError(
                f"With has_items, loss_fn must return (loss, items). {_returned(value)} "
                "Say has_aux=True too for ((loss, items), aux)."
            )
        return Terms(_loss(value[0]), as_items(value[1]))
    if isinstance(value, Mapping):
        pairs = {name: _pair(name, term) for name, term in value.items()}
        if not pairs:
            raise ValueError("loss_fn must return a loss. Received: a dict without terms.")
        return Terms({name: loss for name, (loss, _) in pairs.items()}, {name: n for name, (_, n) in pairs.items()})
    if isinstance(value, tuple | list):
        raise TypeError(
            f"loss_fn must return the mean loss. {_returned(value)} "
            "Say has_items=True for (loss, items), has_aux=True for (loss, aux), both for ((loss, items), aux)."
        )
    return Terms(_loss(value), as_items(items))


def split_aux(result: Any) -> tuple[Any, Any]:
    """The loss and the auxiliary outputs of a `loss_fn` with has_aux."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"With has_aux, loss_fn must return (loss, aux). {_returned(result)}")
    return result


def weighted_mean(values: jax.Array, items: jax.Array, names: Sequence[str]) -> jax.Array:
    """Σ nᵢ·vᵢ / Σ nᵢ over the leading axis and the devices, in at least float32. A value over 0 items may be NaN."""
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    weight = items.astype(dtype).reshape(-1, *[1] * (values.ndim - 1))
    return summed(jnp.where(weight == 0, 0, weight * values).sum(0), names) / summed(weight.sum(), names)


def _returned(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"Received: a {type(value).__name__} of {len(value)}."
    return errors.received("result", value)


def _pair(name: str, term: Any) -> tuple[jax.Array, jax.Array]:
    if not (isinstance(term, tuple) and len(term) == 2):
        raise ValueError(
            f"A loss term must be (loss, items). {errors.received(repr(name), term)} "
            "Return the term's mean and what it is the mean of, such as (loss, mask.sum()); 1 for a mean of means."
        )
    return _loss(term[0]), as_items(term[1])


def _loss(loss: Any) -> jax.Array:
    if not isinstance(loss, jax.Array) or loss.ndim != 0 or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise errors.loss_not_scalar(loss)
    return loss
