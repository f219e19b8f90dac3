"""What an audit asks of the TensorFlow backend: losses and gradients of a model's variables, taken eagerly."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

Objective = Callable[[list[Any], Any], list[tuple[Any, Any]]]


def gradients(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """`objective`'s results for arrays and a scale, and the gradient of the first of each pair."""
    variables = [v.value for v in model.trainable_variables]

    def run(leaves: list[Any], scale: Any) -> tuple[list[Any], list[list[Any]]]:
        with tf.GradientTape(persistent=True) as tape:
            results = objective(leaves, scale)
        return results, [tape.gradient(value, variables) for value, _ in results]

    return run


def losses(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """As `gradients`, without them."""
    return lambda leaves, scale: (objective(leaves, scale), [])


def seed(number: int) -> None:
    """Seeds what draws from the backend itself."""
    tf.random.set_seed(number)
