"""FSDP2 in a window: parameters, gradients and sums spread over the ranks by `fully_shard`.

FSDP adds the gradients up over the ranks in the backward itself. Here is decided in which one:

| sync          | reduce-scatters a window | memory for gradients, a rank        |
|---------------|--------------------------|-------------------------------------|
| "window"      | one a parameter group    | all of them, unsharded              |
| "micro_batch" | one a micro-batch        | its shard, and a group's at a time  |

A window that closes early (`flush`) has had its last backward already, and is reduced by `engines.torch_fsdp`.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch.engines import torch_fsdp
from bigbatch.engines.torch_fsdp import is_spread, local
from bigbatch.torch.collectives import Meetings
from bigbatch.torch.ownership import changed
from bigbatch.torch.window import Window, WindowTotals


class Shards:
    """The modules of one `fully_shard` model, outermost first, as this rank has them.

    Attributes:
        unit: the items that weights are relative to, the same on every rank, from the first micro-batch on.
        failed: why a micro-batch of the open window counts for nothing on this rank, or None.
    """

    def __init__(self, model: torch.nn.Module, sync: Literal["window", "micro_batch"]):
        self.modules = torch_fsdp.shards_in(model)
        for module in self.modules:
            module.reshard()  # after a forward the outermost one's parameters are whole until a backward
        self.sync = sync
        self.parameters: list[Tensor] = list(model.parameters())
        self.unit: float | None = None
        self.failed: Exception | None = None
        self._last = self._inside = False
        self._marks: list[tuple[int, int]] | None = None
        _check_model(model, self.modules)
        self.check()
        self.meetings = Meetings(dist.group.WORLD, self.parameters[0].device)

    def check(self) -> None:
        """Accepts a window whose micro-batches all count, and reductions that divide by the number of ranks.

        That is how FSDP's reductions are, unless the user sets another factor.
        """
        if self.failed is not None:
            raise self.failed
        self.check_untouched()
        for group in torch_fsdp.groups_of(self.modules):
            # No public name reads either: tests/ranks/test_fsdp2.py.
            if group.gradient_divide_factor not in (None, dist.get_world_size()) or group._all_reduce_hook is not None:
                raise ValueError(
                    "A window's mean is over items, and fully_shard was told to reduce otherwise. Received: "
                    f"gradient_divide_factor={group.gradient_divide_factor}, "
                    f"all-reduce hook={group._all_reduce_hook}. Leave set_gradient_divide_factor and "
                    "set_all_reduce_hook out."
                )

    def check_untouched(self) -> None:
        """That the gradients are as the window's last backward left them."""
        if self._marks is not None and self._marks != self._current_marks():
            raise changed(
                "gradients that fully_shard holds were written to, as a backward() of somebody else does",
                "that backward(), or put torch.autograd.grad in its place",
            )

    def _current_marks(self) -> list[tuple[int, int]]:
        """Which tensors hold gradients, and how often they were written to."""
        with torch.no_grad():  # where `local` is the tensor itself and not a view made for autograd
            gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        gradients += [tensor for tensors in self.unreduced().values() for tensor in tensors.values()]
        return [(id(tensor), tensor._version) for tensor in gradients]

    def has_unreduced(self) -> bool:
        """Whether FSDP holds gradients that it has not reduced yet."""
        return any(self.unreduced().values())

    def disable_grad_sync(self, lasting: bool = False) -> Callable[[], None]:
        """Switches FSDP's own reductions off; the returned function ends that. `before` sets them for each backward."""
        self.set_grad_sync(self.sync == "micro_batch", False)
        return lambda: self.set_grad_sync(True, True)

    def set_grad_sync(self, scatter: bool, replicate: bool) -> None:
        """Which reductions a backward does."""
        for module in self.modules:
            module.set_requires_gradient_sync(scatter, recurse=False)
            module.set_requires_all_reduce(replicate, recurse=False)

    def before(self, window: Window, last: bool) -> None:
        """Before a backward, which reduces if it is the window's last."""
        window.folded = True  # after the reduction a gradient is many ranks', whose weights differ
        self._last, self._inside = last, True
        self.set_grad_sync(last or self.sync == "micro_batch", last)
        # Otherwise a reduction may overlap the next forward, since the gradients are not read in between.
        wait = last or self.sync == "window" or window.dtype is not None
        self.modules[0].set_is_last_backward(wait)

    def after(self) -> bool:
        """After a backward: whether it was the window's last."""
        self._inside = False
        self._marks = self._current_marks()
        return self._last

    def reduce(self, window: Window, parameters: list[Tensor], totals: WindowTotals) -> float:
        """Makes sure that the sums are those of all ranks, and returns the factor that they still need."""
        if not self._last:
            self.set_grad_sync(True, True)
            self.modules[0].set_is_last_backward(True)
            torch_fsdp.reduce_now(self.modules)
            if window.dtype is not None:
                window.widen(parameters, window.dtype)
        self._last = False
        return totals.factor * self.meetings.size  # FSDP has divided by the ranks

    def forget(self) -> None:
        """Drops what unsharded gradients have added up, and what an error has left half done."""
        if self._inside:
            self.modules[0].reset_iter_state()
        self._last = self._inside = False
        self.failed = self._marks = None
        torch_fsdp.drop_unreduced(self.modules)

    def unreduced(self) -> dict[str, dict[int, Tensor]]:
        """What this rank alone has added up: unsharded gradients by parameter, and shards not replicated by group."""
        return torch_fsdp.unreduced(self.modules, self.parameters)

    def restore(self, saved: dict[str, dict[int, Tensor]]) -> None:
        """Goes on from what `unreduced` returned."""
        torch_fsdp.restore_unreduced(self.modules, self.parameters, saved)

    def check_parts(self, lengths: list[float]) -> float:
        """Accepts the ranks' parts of a batch, and returns the unit that their items are counted in."""
        if not all(lengths):
            raise ValueError(
                f"fully_shard's forward needs every rank. Received: parts of the batch of {[int(n) for n in lengths]} "
                "examples. Give every rank at least one."
            )
        self.unit = power_of_two(sum(lengths))
        return self.unit

    def slices(self, lengths: list[float], rank: int, micro_batch: int) -> list[tuple[int, int]]:
        """The split API's micro-batches: as many on every rank, since every forward needs all ranks.

        A rank with fewer examples cuts them smaller, and goes through its first one again where they do not suffice.
        """
        self.check_parts(lengths)
        count = max(math.ceil(length / micro_batch) for length in lengths)
        edges = [int(lengths[rank]) * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))


def _check_model(model: torch.nn.Module, modules: list[Any]) -> None:
    """Accepts a model that is spread over all ranks as a whole, and reduced in 32 bits at least."""
    strange = [f"{name}, which is not sharded" for name, p in model.named_parameters() if not is_spread(p)]
    if not set(modules) <= set(modules[0].modules()):
        strange.append("two models")
    if strange:
        raise ValueError(
            f"fully_shard must own every parameter. Received: {strange[0]}. "
            "Call fully_shard on the whole model too, after its parts, and pass that one as model."
        )
    for p in cast(list[Any], list(model.parameters())):
        mesh, replicated = p.device_mesh, p.device_mesh.ndim == 2 and p.placements[0].is_replicate()
        if mesh.size() != dist.get_world_size() or not (mesh.ndim == 1 or replicated):
            raise ValueError(
                "fully_shard must spread the model over all ranks, and nothing else may. "
                f"Received: {mesh} of {dist.get_world_size()} ranks, {p.placements}. "
                "Use a mesh of all ranks, with another dimension before it where the shards are replicated."
            )
    for module in modules:
        policy = torch_fsdp.mixed_precision(module)
        for p in module.parameters():
            narrow = policy.reduce_dtype or policy.param_dtype or p.dtype
            if narrow.itemsize < 4:
                raise ValueError(
                    f"fully_shard would add up gradients in {narrow}. Received: parameters of {p.dtype}, {policy}. "
                    "Pass mp_policy=MixedPrecisionPolicy(..., reduce_dtype=torch.float32) to fully_shard."
                )


def power_of_two(items: float) -> float:
    """At least as many items, and no rounding where something is divided by them."""
    return 2.0 ** math.ceil(math.log2(max(items, 1.0)))
