"""What all ranks must have alike: compared when a Gradients is made, and what may change since, at every close."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bigbatch.torch.ddp import Replicas
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.optimizers import name_of


def gradient_terms(grads: Any, ranks: Ranks, sync: Any, noise: Any) -> dict[str, Any]:
    """Each option of a Gradients, and the parameters, by name."""
    places = {p: i for i, p in enumerate(ranks.parameters)}
    parameters = grads._parameters()
    every = grads.every
    if callable(every):  # its repr may hold an address
        every = getattr(every, "__name__", type(every).__name__)
    return {
        "every": every,
        "dtype": grads.dtype,
        "sync": sync,
        "noise": noise,
        "norm": grads._norm,
        "fused": grads.fused,
        **_signature(parameters),
        "the order of the model's parameters": str([places.get(p, "another's") for p in parameters]),
        **_part_terms("scaler", grads.scaler),
        **(ranks.model.values() if isinstance(ranks.model, Replicas) else {}),
    }


def update_terms(acc: Any) -> dict[str, Any]:
    """The options that an Accumulator has besides, its optimizer's and its scheduler's, by name."""
    return {
        "clip_norm": acc.clip_norm,
        "partial": acc.partial,
        "nonfinite": acc.nonfinite,
        "optimizer": name_of(acc.optimizer),
        **_options(acc.optimizer),
        **_part_terms("scheduler", acc.scheduler),
    }


def _part_terms(name: str, part: Any) -> dict[str, Any]:
    parts = [] if part is None else getattr(part, "schedulers", [part])
    terms: dict[str, Any] = {name: "+".join(type(one).__name__ for one in parts) or "none"}
    if part is not None and hasattr(part, "state_dict"):
        terms |= dict(_numbers_in(part.state_dict(), name))
    return terms


def window_terms(grads: Any, plan: Any) -> dict[str, Any]:
    """What a step depends on besides the gradients, as it is when a window closes."""
    terms = {
        "the update's index": grads.index,
        f"every, for update {grads.index}": plan,
        "requires_grad": "".join("01"[p.requires_grad] for p in grads._parameters()),
        **({} if grads.optimizer is None else _options(grads.optimizer)),
    }
    return terms if grads.scaler is None else {**terms, "the scaler's scale": grads.scaler.get_scale()}


def state_terms(state: Any, ranks: Ranks) -> dict[str, Any]:
    """What the ranks' states must have alike to be states of one training."""
    noise = (state.get("noise") or {}).get("window") is not None
    terms = {"the update's index of the state": state["index"], "whether the state measures noise": noise}
    if ranks.shards is not None:
        window = state["window"]
        terms["the micro-batches in the state's window"] = window and window["micro_batches"]
    return terms


def _signature(parameters: Iterable[Tensor]) -> dict[str, str]:
    shapes = {
        f"parameter {i}": f"{tuple(p.shape)} {p.dtype}{'' if p.requires_grad else ' frozen'}"
        for i, p in enumerate(parameters)
    }
    return {"the number of parameters": str(len(shapes)), **shapes}


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The learning rate, decay and so on of each group, and how many parameters it has."""
    options: dict[str, Any] = {}
    for i, group in enumerate(optimizer.param_groups):
        options[f"the number of parameters in param_groups[{i}]"] = len(group["params"])
        for key, value in group.items():
            if isinstance(value, (bool, int, float)):
                options[f"param_groups[{i}]['{key}']"] = value
            elif value is not None and key not in ("params", "param_names"):
                options.update(_numbers_in(value, f"param_groups[{i}]['{key}']"))
    return options


def _numbers_in(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The plain numbers, flags and words in a nesting, each with its place; a tensor of one number too."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else None
    if isinstance(value, bool | int | float | str):
        yield name, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _numbers_in(child, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, child in enumerate(value):
            yield from _numbers_in(child, f"{name}[{i}]")
