"""What FSDP2 has no public name for: the gradients that its parameter groups hold, and a reduction after a backward.

Modules are those of one model that `fully_shard` was called on, outermost first. The private names are all here, but
for two on parameter groups that `bigbatch.torch.fsdp` checks; tests/ranks/test_fsdp2.py fails when they move.
"""

import sys
from typing import Any

import torch
from torch import Tensor


def shards_in(model: torch.nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on, outermost first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # long to import; who has not, has not called it
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def groups_of(modules: list[Any]) -> list[Any]:
    """The parameter groups, which FSDP gathers and reduces as one."""
    return [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]


def mixed_precision(module: Any) -> Any:
    """The policy that `fully_shard` was given."""
    return module._get_fsdp_state()._mp_policy


def unreduced(modules: list[Any], parameters: list[Tensor]) -> dict[str, dict[int, Tensor]]:
    """The sums that are not of all ranks yet: unsharded gradients by parameter, and shards not replicated by group."""
    unsharded = {}
    for i, p in _unsharded(modules, parameters):
        grad = p.unsharded_accumulated_grad
        if grad is None and hasattr(p, "_unsharded_param"):
            grad = p.unsharded_param.grad
        if grad is not None:
            unsharded[i] = grad
    partial = {i: group._partial_reduce_output for i, group in enumerate(groups_of(modules))}
    return {"unsharded": unsharded, "partial": {i: t for i, t in partial.items() if t is not None}}


def restore_unreduced(modules: list[Any], parameters: list[Tensor], saved: dict[str, dict[int, Tensor]]) -> None:
    """Sets copies of what `unreduced` returned."""
    modules[0]._get_fsdp_state()._lazy_init()  # so that a reduction may come before any forward
    for module in modules:
        module.unshard()
        module.reshard()
    for i, p in _unsharded(modules, parameters):
        if i in saved["unsharded"]:
            p.unsharded_accumulated_grad = saved["unsharded"][i].clone()
    for i, group in enumerate(groups_of(modules)):
        if i in saved["partial"]:
            group._partial_reduce_output = saved["partial"][i].clone()


def drop_unreduced(modules: list[Any]) -> None:
    """Forgets what `unreduced` returns."""
    for group in groups_of(modules):
        group._partial_reduce_output = None
        for p in group.fsdp_params:
            p.unsharded_accumulated_grad = None
            if hasattr(p, "_unsharded_param"):
                p.unsharded_param.grad = None


def reduce_now(modules: list[Any]) -> None:
    """What the end of a last backward does, without one."""
    groups = groups_of(modules)
    unused = [group.reduce_scatter_unused_params for group in groups]
    if any(group._partial_reduce_output is not None for group in groups):
        # Scattered already and not yet replicated: FSDP only does the second after the first, here of zeros.
        for group in groups:
            group.reduce_scatter_unused_params = True
    modules[0]._get_fsdp_state()._root_post_backward_final_callback()
    for group, before in zip(groups, unused, strict=True):
        group.reduce_scatter_unused_params = before


def _unsharded(modules: list[Any], parameters: list[Tensor]) -> list[tuple[int, Any]]:
    """FSDP's own objects for parameters, each with the parameter's place."""
    index = {p: i for i, p in enumerate(parameters)}
    return [(index[p.sharded_param], p) for group in groups_of(modules) for p in group.fsdp_params]


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
    """A copy of what `local` returned, spread as a parameter is."""
    if not is_spread(p):
        return part.to(p.device, dtype, copy=True)
    spread: Any = torch.zeros_like(p, dtype=dtype)
    spread.to_local().copy_(part)
    return spread
