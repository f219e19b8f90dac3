"""What fits in memory: the size of a chunked function's pieces, and how many of them keep their activations."""

import logging
import time
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bigbatch.engines.torch_estimate import DryRuns, device_memory, reserve
from bigbatch.engines.torch_leaves import parameters_of
from bigbatch.plan import Choice, budget, choose, log_choice
from bigbatch.torch.batch import mapped
from bigbatch.torch.chunked_leaves import Leaf, outputs_of
from bigbatch.torch.replay import Setting

logger = logging.getLogger("bigbatch.torch")


class Given(NamedTuple):
    """What one call of a chunked function works on.

    Attributes:
        setting: the function, and what surrounds it.
        arguments: (args, kwargs).
        leaves: of the arguments, in the order of `mapped`.
        length: examples in the batch.
    """

    setting: Setting
    arguments: Any
    leaves: list[Leaf]
    length: int


class Planner:
    """What one chunked function remembers of memory: the size of its pieces for each kind of call.

    Its first plan leaves twice the parameters free for the state that an optimizer makes at its first step.
    """

    def __init__(self) -> None:
        self._choices: dict[Any, Choice] = {}
        self._first = True

    def choice(self, given: Given, dtype: torch.dtype | None) -> Choice:
        """The size of the pieces for such arguments, beside all outputs and the gradients of inputs."""
        setting = given.setting
        key = (
            tuple(leaf.kind for leaf in given.leaves),
            torch.is_grad_enabled(),
            tuple(setting.training.values()),
            sum(p.requires_grad for p in setting.holder.parameters()),
        )
        if key not in self._choices:
            self._choices[key] = self._planned(given, dtype)
        return self._choices[key]

    def _planned(self, given: Given, dtype: torch.dtype | None) -> Choice:
        started, length, differentiated = time.perf_counter(), given.length, torch.is_grad_enabled()
        made: dict[str, int] = {}

        def loss_fn(parts: list[Any]) -> tuple[Tensor, Any]:
            """The sum of all outputs, and what is there during the backward beside it."""
            following = iter(parts)
            with torch.set_grad_enabled(differentiated):
                args, kwargs = mapped(given.arguments, lambda _: next(following))
                result = given.setting.function(*args, **kwargs)
                outputs = [y for _, y in outputs_of(result, "output", made["examples"])]
                made["bytes"] = sum(y.nbytes for y in outputs)
                sums = [y.sum() for y in outputs if y.requires_grad]
                return sum(sums, torch.zeros((), device=given.setting.device)), result

        def cut(size: int) -> list[Any]:
            made["examples"] = size
            parts = [leaf.part(0, size) for leaf in given.leaves]
            return [p.requires_grad_() if differentiated and leaf.needs_gradient else p
                    for p, leaf in zip(parts, given.leaves, strict=True)]  # fmt: skip

        def reached(loss: Tensor) -> list[Tensor]:
            return parameters_of(loss) if loss.requires_grad else []

        dry_runs, known = DryRuns(loss_fn, cut, reached, length, dtype, "function"), {}
        known[length] = dry_runs.needs(length)  # detects the device as well
        kept = 2 * made["bytes"] * length // made["examples"]
        kept += sum(leaf.value.nbytes for leaf in given.leaves if differentiated and leaf.needs_gradient)
        allowed = self._budget(dry_runs.device, kept, dry_runs.parameters)
        plan = choose(dry_runs.needs, length, allowed, dry_runs.how, notes=dry_runs.notes(), known=known)
        log_choice(logger, plan, started)
        return Choice(plan, plan.micro_batch)

    def keep(self, device: torch.device, each: int, kept: int, parameters: int) -> int:
        """How many pieces can keep `each` bytes of activations, beside `kept` bytes and two pieces that run."""
        return int(self._budget(device, kept + 2 * each, parameters).headroom / max(1, each))

    def _budget(self, device: torch.device, kept: int, parameters: int) -> Any:
        optimizer, self._first = 2 * parameters if self._first else 0, False
        return budget(None, device_memory(device), keep=kept + optimizer, reserve=reserve(device))


class KeptBytes:
    """Counts what a graph that is made inside keeps beside `known` tensors."""

    def __init__(self, known: list[Tensor]):
        self._known = {t.untyped_storage().data_ptr() for t in known}
        self._sizes: dict[int, int] = {}

    @property
    def total(self) -> int:
        """In bytes."""
        return sum(self._sizes.values())

    def counting(self) -> AbstractContextManager[Any]:
        """Where the graph is made."""
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor
