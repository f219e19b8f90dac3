"""What becomes of a loss function's auxiliary outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bigbatch import errors
from bigbatch.jax.batch import Batch
from bigbatch.jax.distributed import summed
from bigbatch.jax.terms import weighted_mean

WORDS = ("mean", "sum", "concatenate")


@dataclass(frozen=True)
class Carry:
    """Made by `carry`."""

    argnum: int

    def __repr__(self) -> str:
        return f"carry({self.argnum})"


def carry(argnum: int) -> Carry:
    """Marks an auxiliary output as the next micro-batch's argument `argnum`: BatchNorm's statistics, a model's state.

    The call's own argument is what the first micro-batch gets, and what the last one gave comes back in the aux.
    """
    return Carry(argnum)


class Aux:
    """The words for the auxiliary outputs, a tree that is a prefix of theirs."""

    def __init__(self, words: Any):
        self.words, self.tree = jax.tree.flatten(words)
        for word in self.words:
            if not isinstance(word, Carry):
                errors.check_choice("aux", word, WORDS)

    @property
    def argnums(self) -> tuple[int, ...]:
        """The arguments that are carried."""
        return tuple(word.argnum for word in self.words if isinstance(word, Carry))

    def specs(self, spread: P) -> Any:
        """How the outputs lie on devices, where an example's entries are `spread`: `out_specs` for `shard_map`."""
        return self.tree.unflatten(spread if word == "concatenate" else P() for word in self.words)

    def split(self, outputs: Any) -> tuple[list[Any], dict[int, Any]]:
        """One micro-batch's outputs: those to keep, None in place of the others, and those that are carried."""
        try:
            parts = self.tree.flatten_up_to(outputs)
        except ValueError as error:
            received = f"{jax.tree.unflatten(self.tree, self.words)} for outputs of {jax.tree.structure(outputs)}"
            raise ValueError(f"aux must be nested as loss_fn's auxiliary outputs are. Received: {received}.") from error
        kept = [None if isinstance(word, Carry) else part for word, part in zip(self.words, parts, strict=True)]
        carried = {w.argnum: part for w, part in zip(self.words, parts, strict=True) if isinstance(w, Carry)}
        return kept, carried

    def join(self, full: list[Any], tail: list[Any], carried: dict[int, Any], finish: Callable[..., Any]) -> Any:
        """The window's outputs, once `finish` has made one of the stacked parts and the shorter micro-batch's."""
        return self.tree.unflatten(
            carried[word.argnum] if isinstance(word, Carry) else finish(word, f, t)
            for word, f, t in zip(self.words, full, tail, strict=True)
        )


def finish(word: str, parts: Sequence[Any], items: jax.Array, batch: Batch, names: Sequence[str]) -> Any:
    """One output of all micro-batches as the window's.

    Args:
        word: what becomes of it.
        parts: the full micro-batches' outputs, stacked, and the shorter one's or None.
        items: what the micro-batches count for in a mean.
        batch: where they come from.
        names: the axes of the devices that they are spread over.
    """

    def leaf(full: jax.Array, tail: jax.Array | None) -> jax.Array:
        if word == "concatenate":
            if full.shape[1:2] != (batch.size,):
                raise ValueError(
                    "An auxiliary output to concatenate must have one entry an example along its leading dimension. "
                    f"Received: shape {full.shape[1:]} from a micro-batch of {batch.size}. Say 'mean' or 'sum'."
                )
            return batch.gather(full, tail)
        every = stack(full, tail)
        if word == "mean":
            return weighted_mean(every, items, names)
        return summed(every.sum(0, dtype=None if every.dtype == bool else every.dtype), names)

    full, tail = parts
    return jax.tree.map(lambda x: leaf(x, None), full) if tail is None else jax.tree.map(leaf, full, tail)


def stack(full: jax.Array, tail: jax.Array | None) -> jax.Array:
    """The shorter micro-batch's value after those of the full ones."""
    return full if tail is None else jnp.concatenate([full, tail[None]])
