"""The auxiliary outputs of a loss function: their mean, their sum, all of them, or the next micro-batch's argument."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from bigbatch import errors
from bigbatch.jax.batch import Batch
from bigbatch.jax.distributed import summed
from bigbatch.jax.terms import weighted_mean

RULES = ("mean", "sum", "concatenate")


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


Rule = Literal["mean", "sum", "concatenate"] | Carry  # for one auxiliary output


class Aux:
    """The `aux` argument: rules for the auxiliary outputs, in a tree that is a prefix of theirs."""

    def __init__(self, rules: Any):
        self.rules, self.tree = jax.tree.flatten(rules)
        for rule in self.rules:
            if not isinstance(rule, Carry):
                errors.check_choice("aux", rule, RULES)

    @property
    def argnums(self) -> tuple[int, ...]:
        """The arguments that are carried."""
        return tuple(rule.argnum for rule in self.rules if isinstance(rule, Carry))

    def specs(self, spread: P) -> Any:
        """The outputs' layout on devices, where examples are `spread`: `out_specs` for `shard_map`."""
        return self.tree.unflatten(spread if rule == "concatenate" else P() for rule in self.rules)

    def split(self, outputs: Any) -> tuple[list[Any], dict[int, Any]]:
        """One micro-batch's outputs: those to stack, with None in place of the others; and those that are carried."""
        try:
            parts = self.tree.flatten_up_to(outputs)
        except ValueError as error:
            received = f"{jax.tree.unflatten(self.tree, self.rules)} for outputs of {jax.tree.structure(outputs)}"
            raise ValueError(f"aux must be nested as loss_fn's auxiliary outputs are. Received: {received}.") from error
        pairs = list(zip(self.rules, parts, strict=True))
        stacked = [None if isinstance(rule, Carry) else part for rule, part in pairs]
        return stacked, {rule.argnum: part for rule, part in pairs if isinstance(rule, Carry)}

    def join(self, full: list[Any], last: list[Any], carried: dict[int, Any], finish: Callable[..., Any]) -> Any:
        """The window's outputs: what is carried, and `finish(rule, stacked, last)` of the others."""
        return self.tree.unflatten(
            carried[rule.argnum] if isinstance(rule, Carry) else finish(rule, *parts)
            for rule, *parts in zip(self.rules, full, last, strict=True)
        )


def finish(rule: str, full: Any, last: Any, items: jax.Array, batch: Batch, names: Sequence[str]) -> Any:
    """One output of all micro-batches as the window's.

    Args:
        rule: "mean", "sum" or "concatenate".
        full: the full micro-batches' outputs, stacked.
        last: the shorter micro-batch's, or None.
        items: what the micro-batches count for in a mean.
        batch: the batch that they are of.
        names: the axes of the devices that they are spread over.
    """

    def leaf(full: jax.Array, last: jax.Array | None) -> jax.Array:
        if rule == "concatenate":
            if full.shape[1:2] != (batch.size,):
                raise ValueError(
                    "An auxiliary output to concatenate must have one entry an example along its leading dimension. "
                    f"Received: shape {full.shape[1:]} from a micro-batch of {batch.size}. Say 'mean' or 'sum'."
                )
            return batch.unstride(full, last)
        stacked = stack(full, last)
        if rule == "mean":
            return weighted_mean(stacked, items, names)
        return summed(stacked.sum(0, dtype=None if stacked.dtype == bool else stacked.dtype), names)

    return jax.tree.map(lambda x: leaf(x, None), full) if last is None else jax.tree.map(leaf, full, last)


def stack(full: jax.Array, last: jax.Array | None) -> jax.Array:
    """The shorter micro-batch's value after those of the full ones."""
    return full if last is None else jnp.concatenate([full, last[None]])
