"""What an audit asks of the JAX backend: losses and gradients of a model's variables, compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras

Objective = Callable[[list[Any], Any], list[tuple[Any, Any]]]


def gradients(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """`objective`'s results for arrays and a scale, and the gradient of the first of each pair, compiled."""

    def run(pure: Callable[[Any], Any], values: Any) -> tuple[Any, Any, Any]:
        losses, back, aux = jax.vjp(pure, values, has_aux=True)
        one_hot = [[jnp.full_like(value, j == k) for j, value in enumerate(losses)] for k in range(len(losses))]
        return losses, aux, [back(cotangents)[0] for cotangents in one_hot]

    return _assigning(model, objective, run)


def losses(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """As `gradients`, without them."""
    return _assigning(model, objective, lambda pure, values: (*pure(values), []))


def _assigning(model: Any, objective: Objective, run: Callable[..., tuple[Any, Any, Any]]) -> Callable[..., Any]:
    """A compiled function of the model's variables, which assigns those that it changed."""
    trainable = model.trainable_variables
    others = [*model.non_trainable_variables, *model.metrics_variables]

    @jax.jit
    def compiled(values: Any, state: Any, leaves: list[Any], scale: Any) -> Any:
        def pure(values: Any) -> tuple[list[Any], Any]:
            mapping = list(zip([*trainable, *others], [*values, *state], strict=True))
            with keras.StatelessScope(mapping, collect_losses=True) as scope:
                results = objective(leaves, scale)
            changed = [scope.get_current_value(v) for v in others]
            return [value for value, _ in results], ([items for _, items in results], changed)

        return run(pure, values)

    def call(leaves: list[Any], scale: Any) -> tuple[list[Any], list[list[Any]]]:
        values, state = ([v.value for v in variables] for variables in (trainable, others))
        losses, (items, changed), grads = compiled(values, state, leaves, scale)
        for v, value in zip(others, changed, strict=True):
            v.assign(value)
        return list(zip(losses, items, strict=True)), grads

    return call


def seed(number: int) -> None:
    """Nothing to seed: JAX draws from keys alone."""
