"""What a loss function returns: one mean loss, alone or with its items, or several terms, each with its own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbatch import errors
from bigbatch.jax.devices import summed
from bigbatch.jax.window import as_items


class Terms(NamedTuple):
    """A micro-batch's mean losses and their items: scalars, or mappings from a term's name; later many, stacked."""

    losses: Any
    items: Any

    @property
    def several(self) -> bool:
        """Whether there are terms by name."""
        return isinstance(self.losses, dict)

    def means(self, names: Sequence[str]) -> Any:
        """Σ nᵢ·lossᵢ / Σ nᵢ of each term, over stacked micro-batches and the devices of these axes."""
        return jax.tree.map(lambda loss, items: weighted_mean(loss, items, names), self.losses, self.items)


def as_terms(value: Any, items: float) -> Terms:
    """Accepts what `loss_fn` returned; `items` is what it counts for unless it says."""
    if isinstance(value, Mapping):
        pairs = {name: _pair(name, term) for name, term in value.items()}
        return Terms({name: loss for name, (loss, _) in pairs.items()}, {name: n for name, (_, n) in pairs.items()})
    loss, items = value if isinstance(value, tuple) and len(value) == 2 else (value, items)
    return Terms(_loss(loss), as_items(items))


def weighted_mean(values: jax.Array, items: jax.Array, names: Sequence[str]) -> jax.Array:
    """Σ nᵢ·vᵢ / Σ nᵢ over the leading axis and devices, in at least float32. What counts for no items may be NaN."""
    dtype = jnp.promote_types(values.dtype, jnp.float32)
    weight = items.astype(dtype).reshape(-1, *[1] * (values.ndim - 1))
    return summed(jnp.where(weight == 0, 0, weight * values).sum(0), names) / summed(weight.sum(), names)


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
