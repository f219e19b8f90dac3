"""Several optimizers that make one update together, and their schedulers: Muon for matrices and AdamW for the rest."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Optimizers:
    """All of their parameters, and one step of each.

    Args:
        optimizers: have no parameter in common.
    """

    def __init__(self, optimizers: Iterable[Optimizer]):
        self.optimizers = tuple(optimizers)

    def __repr__(self) -> str:
        return "+".join(type(optimizer).__name__ for optimizer in self.optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the first, then those of the second, and so on."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Of each, in the order given."""
        for optimizer in self.optimizers:
            optimizer.step()


def parameters_in(optimizer: Any) -> list[Tensor]:
    """The parameters of every group, as they are now."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def name_of(optimizer: Any) -> str:
    """The class of an optimizer, or of each of several."""
    return repr(optimizer) if isinstance(optimizer, Optimizers) else type(optimizer).__name__


class Schedulers:
    """One step of each, in the order given."""

    def __init__(self, schedulers: Iterable[Any]):
        self.schedulers = tuple(schedulers)

    def step(self) -> None:
        """Of all."""
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self) -> dict[int, Any]:
        """Of each that has one, by its place."""
        return {i: s.state_dict() for i, s in enumerate(self.schedulers) if hasattr(s, "state_dict")}
