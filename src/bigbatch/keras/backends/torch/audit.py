"""What an audit asks of the PyTorch backend: losses, and gradients of a model's variables, not in `.grad`."""

from collections.abc import Callable
from typing import Any

import torch

Objective = Callable[[list[Any], Any], list[tuple[Any, Any]]]


def gradients(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """`objective`'s results for arrays and a scale, and the gradient of the first of each pair; not in `.grad`."""
    parameters = [v.value for v in model.trainable_variables]

    def run(leaves: list[Any], scale: Any) -> tuple[list[Any], list[list[Any]]]:
        results = objective(leaves, scale)
        return results, [
            list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))
            if value.requires_grad
            else [None] * len(parameters)
            for value, _ in results
        ]

    return run


def losses(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """As `gradients`, without them."""

    @torch.no_grad()
    def run(leaves: list[Any], scale: Any) -> tuple[list[Any], list[list[Any]]]:
        return objective(leaves, scale), []

    return run


def seed(number: int) -> None:
    """Seeds what draws from the backend itself."""
    torch.manual_seed(number)
