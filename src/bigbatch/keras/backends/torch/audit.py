"""What an audit asks of the PyTorch backend: losses, and gradients of a model's variables, not in `.grad`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from bigbatch.engines import torch_rng

Objective = Callable[[list[Any], Any], list[tuple[Any, Any]]]


def gradients(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """What `objective` returns of arrays and a scale, and the gradient of the first of each pair; not in `.grad`."""
    parameters = [v.value for v in model.trainable_variables]

    def run(leaves: list[Any], scale: Any) -> tuple[list[Any], list[list[Any]]]:
        found = objective(leaves, scale)
        return found, [
            list(torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True))
            if value.requires_grad
            else [None] * len(parameters)
            for value, _ in found
        ]

    return run


def losses(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """As `gradients`, without them."""

    @torch.no_grad()
    def run(leaves: list[Any], scale: Any) -> tuple[list[Any], list[list[Any]]]:
        return objective(leaves, scale), []

    return run


def chance_kept(model: Any) -> AbstractContextManager[None]:
    """What PyTorch draws from is afterwards what it was."""
    return torch_rng.kept([v.value for v in model.variables])


def seed_chance(seed: int) -> None:
    """Of what draws past Keras."""
    torch.manual_seed(seed)
