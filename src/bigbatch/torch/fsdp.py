"""FSDP2 in a window: parameters, gradients and sums spread over the ranks by `fully_shard`.

Here the gradients are added up over the ranks in the backward itself, by FSDP. What is left to say is in which one:

| sync          | reduce-scatters a window | memory for gradients, a rank        |
|---------------|--------------------------|-------------------------------------|
| "window"      | one a parameter group    | all of them, unsharded              |
| "micro_batch" | one a micro-batch        | its shard, and a group's at a time  |

A window that closes early (`flush`) has had its last backward already. FSDP has no public way to reduce after it, so
`_reduce_now` and the few names below it are private ones; tests/ranks/test_fsdp2.py fails when they move.
"""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch.torch.collectives import Meetings, Met
from bigbatch.torch.ownership import changed
from bigbatch.torch.window import Window


def shards_in(model: torch.nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on, outermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # long to import; who has not, has not called it
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


class Shards:
    """The modules of one `fully_shard` model, outermost first, as this rank has them.

    Attributes:
        unit: the items that weights are relative to, the same on every rank, from the first micro-batch on.
        failed: why a micro-batch of the open window counts for nothing on this rank, or None.
    """

    def __init__(self, model: torch.nn.Module, sync: Literal["window", "micro_batch"]):
        self.modules = shards_in(model)
        for module in self.modules:
            module.reshard()  # after a forward the outermost one's parameters are whole until a backward
        self.sync = sync
        self.parameters: list[Tensor] = list(model.parameters())
        self.unit: float | None = None
        self.failed: Exception | None = None
        self._last = self._inside = False
        self._marks: list[tuple[int, int]] | None = None
        self._check_model(model)
        self.meetings = Meetings(dist.group.WORLD, self.parameters[0].device)

    def _check_model(self, model: torch.nn.Module) -> None:
        strange = [f"{name}, which is not sharded" for name, p in model.named_parameters() if not is_spread(p)]
        if not set(self.modules) <= set(self.modules[0].modules()):
            strange.append("two models")
        if strange:
            raise ValueError(
                f"fully_shard must own every parameter. Received: {strange[0]}. "
                "Call fully_shard on the whole model too, after its parts, and pass that one as model."
            )
        for p in cast(list[Any], self.parameters):
            mesh, replicated = p.device_mesh, p.device_mesh.ndim == 2 and p.placements[0].is_replicate()
            if mesh.size() != dist.get_world_size() or not (mesh.ndim == 1 or replicated):
                raise ValueError(
                    "fully_shard must spread the model over all ranks, and nothing else may. "
                    f"Received: {mesh} of {dist.get_world_size()} ranks, {p.placements}. "
                    "Use a mesh of all ranks, with another dimension before it where the shards are replicated."
                )
        for module in self.modules:
            policy = module._get_fsdp_state()._mp_policy
            for p in module.parameters():
                narrow = policy.reduce_dtype or policy.param_dtype or p.dtype
                if narrow.itemsize < 4:
                    raise ValueError(
                        f"fully_shard would add up gradients in {narrow}. Received: parameters of {p.dtype}, {policy}. "
                        "Pass mp_policy=MixedPrecisionPolicy(..., reduce_dtype=torch.float32) to fully_shard."
                    )
        self.check()

    def check(self) -> None:
        """Accepts a window whose micro-batches all count, and reductions that divide by the number of ranks.

        That is what FSDP's do, unless it is told otherwise.
        """
        if self.failed is not None:
            raise self.failed
        self.check_untouched()
        for group in self._groups():
            if group.gradient_divide_factor not in (None, dist.get_world_size()) or group._all_reduce_hook is not None:
                raise ValueError(
                    "A window's mean is over items, and fully_shard was told to reduce otherwise. Received: "
                    f"gradient_divide_factor={group.gradient_divide_factor}, "
                    f"all-reduce hook={group._all_reduce_hook}. Leave set_gradient_divide_factor and "
                    "set_all_reduce_hook out."
                )

    def check_untouched(self) -> None:
        """That the gradients are as the window's last backward left them."""
        if self._marks is not None and self._marks != self._seen():
            raise changed(
                "gradients that fully_shard holds were written to, as a backward() of somebody else does",
                "that backward(), or put torch.autograd.grad in its place",
            )

    def _seen(self) -> list[tuple[int, int]]:
        """Which tensors hold gradients, and how often they were written to."""
        with torch.no_grad():  # where `local` is the tensor itself and not a view made for autograd
            held = [local(p.grad) for p in self.parameters if p.grad is not None]
        held += [tensor for tensors in self.held().values() for tensor in tensors.values()]
        return [(id(tensor), tensor._version) for tensor in held]

    def hold_gradients(self) -> bool:
        """Whether FSDP holds gradients that it has not reduced yet."""
        return any(self.held().values())

    def defer(self, lasting: bool = False) -> Callable[[], None]:
        """Defers FSDP's own reductions; the returned function ends that. `before` decides anew for each backward."""
        self._synchronize(self.sync == "micro_batch", False)
        return lambda: self._synchronize(True, True)

    def before(self, window: Window, last: bool) -> None:
        """Before a backward, which reduces if it is the window's last."""
        window.folded = True  # after the reduction a gradient is many ranks', whose weights differ
        self._last, self._inside = last, True
        self._synchronize(last or self.sync == "micro_batch", last)
        # Until then reductions may go on beside the next forward, where nobody looks at the gradients between.
        wait = last or self.sync == "window" or window.dtype is not None
        self.modules[0].set_is_last_backward(wait)

    def after(self) -> bool:
        """After a backward: whether it was the window's last."""
        self._inside = False
        self._marks = self._seen()
        return self._last

    def reduce(self, window: Window, parameters: list[Tensor], met: Met) -> float:
        """Sees that the sums are those of all ranks, and returns what they still need."""
        if not self._last:
            self._reduce_now()
            if window.dtype is not None:
                window.widen(parameters, window.dtype)
        self._last = False
        return met.sums.factor * self.meetings.size  # FSDP has divided by the ranks

    def forget(self) -> None:
        """Drops what unsharded gradients have added up, and what an error has left half done."""
        if self._inside:
            self.modules[0].reset_iter_state()
        self._last = self._inside = False
        self.failed = self._marks = None
        for group in self._groups():
            group._partial_reduce_output = None
            for p in group.fsdp_params:
                p.unsharded_accumulated_grad = None
                if hasattr(p, "_unsharded_param"):
                    p.unsharded_param.grad = None

    def held(self) -> dict[str, dict[int, Tensor]]:
        """What this rank alone has added up: unsharded gradients by parameter, and shards not replicated by group."""
        unsharded = {}
        for i, p in self._unsharded():
            grad = p.unsharded_accumulated_grad
            if grad is None and hasattr(p, "_unsharded_param"):
                grad = p.unsharded_param.grad
            if grad is not None:
                unsharded[i] = grad
        partial = {i: group._partial_reduce_output for i, group in enumerate(self._groups())}
        return {"unsharded": unsharded, "partial": {i: t for i, t in partial.items() if t is not None}}

    def restore(self, held: dict[str, dict[int, Tensor]]) -> None:
        """Goes on from what `held` returned."""
        self.modules[0]._get_fsdp_state()._lazy_init()  # so that a flush may be the first thing to come
        for module in self.modules:
            module.unshard()
            module.reshard()
        for i, p in self._unsharded():
            if i in held["unsharded"]:
                p.unsharded_accumulated_grad = held["unsharded"][i].clone()
        for i, group in enumerate(self._groups()):
            if i in held["partial"]:
                group._partial_reduce_output = held["partial"][i].clone()

    def cut(self, lengths: list[float], rank: int, micro_batch: int) -> list[tuple[int, int]]:
        """The split door's micro-batches: as many on every rank, since every forward needs all ranks.

        A rank with fewer examples cuts them smaller, and goes through its first one again where they do not suffice.
        """
        if not all(lengths):
            raise ValueError(
                f"fully_shard's forward needs every rank. Received: parts of the batch of {[int(n) for n in lengths]} "
                "examples. Give every rank at least one."
            )
        self.unit = power_of_two(sum(lengths))
        count = max(math.ceil(length / micro_batch) for length in lengths)
        edges = [int(lengths[rank]) * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))

    def _synchronize(self, scatter: bool, replicate: bool) -> None:
        for module in self.modules:
            module.set_requires_gradient_sync(scatter, recurse=False)
            module.set_requires_all_reduce(replicate, recurse=False)

    def _reduce_now(self) -> None:
        """What the end of a last backward does, without one."""
        self._synchronize(True, True)
        self.modules[0].set_is_last_backward(True)
        groups = self._groups()
        unused = [group.reduce_scatter_unused_params for group in groups]
        if any(group._partial_reduce_output is not None for group in groups):
            # Scattered already and not yet replicated: FSDP only does the second after the first, here of zeros.
            for group in groups:
                group.reduce_scatter_unused_params = True
        self.modules[0]._get_fsdp_state()._root_post_backward_final_callback()
        for group, before in zip(groups, unused, strict=True):
            group.reduce_scatter_unused_params = before

    def _groups(self) -> list[Any]:
        return [group for module in self.modules for group in module._get_fsdp_state()._fsdp_param_groups]

    def _unsharded(self) -> list[tuple[int, Any]]:
        index = {p: i for i, p in enumerate(self.parameters)}
        return [(index[p.sharded_param], p) for group in self._groups() for p in group.fsdp_params]


def is_spread(tensor: Any) -> bool:
    """Whether it is a DTensor, whose module takes as long to import."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Tensor:
    """The same numbers on every rank."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def local(tensor: Any) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if is_spread(tensor) else tensor


def spread_like(p: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of what `local` returned, kept as a parameter is."""
    if not is_spread(p):
        return part.to(p.device, dtype, copy=True)
    spread: Any = torch.zeros_like(p, dtype=dtype)
    spread.to_local().copy_(part)
    return spread


def power_of_two(items: float) -> float:
    """At least as many items, and no rounding where something is divided by them."""
    return 2.0 ** math.ceil(math.log2(max(items, 1.0)))
