"""What a loss function returns: one mean loss, alone or with its items, or several terms, each with its own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbatch import errors
from bigbatch.jax.distributed import summed
from bigbatch.jax.window import as_items, at_hand


class Terms(NamedTuple):
    """A micro-batch's mean losses and their items: scalars, or mappings from a term's name; later many, stacked."""

    losses: Any
    items: Any

    @property
    def several(self) -> bool:
        """Whether there are terms by name."""
        return isinstance(self.losses, dict)

    def poisoned(self, tree: Any) -> Any:
        """The same arrays, or NaN where items turn out to be none (see `as_items`)."""
        unseen = [items for items in jax.tree.leaves(self.items) if at_hand(items) is None]
        if not unseen:
            return tree
        poison = jnp.where(jnp.isnan(sum(unseen)), jnp.nan, 0)
        return jax.tree.map(lambda x: x + poison.astype(x.dtype), tree)

    def means(self, names: Sequence[str]) -> Any:
        """Σ nᵢ·lossᵢ / Σ nᵢ of each term, over stacked micro-batches and the devices of these axes."""
        return jax.tree.map(lambda loss, items: weighted_mean(loss, items, names), self.losses, self.items)


def as_terms(value: Any, items: float, has_items: bool) -> Terms:
    """Accepts what `loss_fn` returned; `items` is what it counts for unless it says."""
    if has_items:
        if not (isinstance(value, tuple) and len(value) == 2):
            raise TypeError(f"With has_items, loss_fn must return (loss, items). {_returned(value)}")
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
    """Σ nᵢ·vᵢ / Σ nᵢ over the leading axis and devices, in at least float32. What counts for no items may be NaN."""
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
