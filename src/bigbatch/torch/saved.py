"""An open window as plain numbers and tensors, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bigbatch.torch.ranks import Ranks
from bigbatch.torch.shards import local, spread_like
from bigbatch.torch.window import Window


def held(window: Window, parameters: list[Tensor], ranks: Ranks | None) -> dict[str, Any]:
    """What a window holds, of several ranks this rank's part, by each parameter's place.

    The gradients are no copies; products that are not multiplied out yet come as their factors.
    """
    waiting = window.products.waiting()
    gradients = ((i, window.sums.get(p, p.grad)) for i, p in enumerate(parameters))
    return {
        "ranks": ranks.size if ranks else 1,
        "micro_batches": window.micro_batches,
        "repeats": window.repeats,
        "items": window.items,
        "unit": window.unit,
        "loss": window.loss,
        "shards": ranks.shards.held() if ranks and ranks.shards else {},
        "gradients": {i: local(grad) for i, grad in gradients if grad is not None},
        "waiting": {i: waiting[p] for i, p in enumerate(parameters) if p in waiting},
    }


def restore(window: Window, saved: Mapping[str, Any], parameters: list[Tensor], ranks: Ranks | None) -> None:
    """Makes of a window that was just opened the one that `held` saw, with tensors of its own."""
    window.micro_batches, window.items, window.unit = saved["micro_batches"], saved["items"], saved["unit"]
    window.repeats, window.loss = saved.get("repeats", 0), saved["loss"].clone()
    for i, grad in saved["gradients"].items():
        p = parameters[i]
        if window.dtype is None:
            p.grad = spread_like(p, grad, p.dtype)
        else:
            window.sums[p] = spread_like(p, grad, grad.dtype)
    for i, (left, right) in saved.get("waiting", {}).items():  # older states have none
        window.products.wait_again(parameters[i], left, right)
    if ranks is not None and ranks.shards is not None:
        ranks.shards.restore(saved["shards"])


def check_state(state: Mapping[str, Any], parameters: list[Tensor], ranks: Ranks | None) -> None:
    """Accepts an Accumulator's state of these parameters, and of as many ranks where a window is open in it."""
    shapes = [tuple(p.shape) for p in parameters]
    missing = {"index", "shapes", "window"} - set(state)
    if missing:
        raise ValueError(f"The state is not an Accumulator's. Received: keys {sorted(state)}.")
    if [tuple(shape) for shape in state["shapes"]] != shapes:
        raise ValueError(
            "The state is of other parameters. "
            f"Received: shapes {state['shapes']}, but the optimizer holds {shapes}. "
            "Build the same model and parameter groups before loading."
        )
    saved, size = state["window"], ranks.size if ranks else 1
    if saved is not None and saved.get("ranks", 1) != size:
        raise ValueError(
            f"The state was saved inside a window on {saved.get('ranks', 1)} ranks, each with its own part of it. "
            f"Received: {size} ranks. Load it on as many, or save where no window is open."
        )
