"""What a loss is the mean of, found by experiment: a batch's loss must be its parts' losses, weighted by the items.

The experiments run without gradients and without dropout, and on weights that are slightly moved, since many losses are
constant where training starts (a preference loss whose policy is the reference, a head that starts at zero).
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigbatch.engines import randomness, torch_rng
from bigbatch.transformers.counts import SUM, candidates
from bigbatch.transformers.variants import Parted, variants

MOVED = 2**24
"""Of how many weights at most copies are made."""

ROUNDING, COARSE = (5e-6, 0.0), (5e-4, 2e-2)  # of float32, of narrower dtypes
"""What a loss may be off by: a fraction of itself, and a fraction of the difference between the parts' losses."""

Loss = Callable[[dict[str, Any]], Any]


def consistent(loss: Loss, inputs: Mapping[str, Any], names: Iterable[str], *, coarse: bool) -> tuple[list[str], str]:
    """Which of the candidates explain the loss of this micro-batch and of its variants.

    Args:
        loss: of such inputs, as a scalar tensor.
        inputs: a micro-batch.
        names: the candidates.
        coarse: whether the loss is computed in less than float32.

    Returns:
        Those that explain every experiment; and where none was possible, the reason.
    """
    counts = candidates(inputs)
    alive, failed, done = [name for name in names if name in counts], "", False
    for batch in variants(inputs):
        try:
            losses = [float(loss(dict(part))) for part in batch]
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as error:
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if all(map(math.isfinite, losses)):
            done = True
            alive = [name for name in alive if _explains(name, counts[name], batch, losses, coarse)]
    return (alive, "") if done else ([], failed or "the losses are not finite")


def _explains(name: str, count: Callable[[Any], Any], batch: Parted, losses: list[float], coarse: bool) -> bool:
    whole, first, second = losses
    n, m = float(count(batch.first)), float(count(batch.second))
    if not n + m:
        return False
    predicted = first + second if name == SUM else (n * first + m * second) / (n + m)
    relative, apart = COARSE if coarse else ROUNDING
    scale = max(abs(whole), abs(first), abs(second), 1e-2)
    return abs(predicted - whole) <= relative * scale + apart * abs(first - second)


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model without dropout, on weights slightly moved; afterwards it and the random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    moved = [(p, p.data) for p in _smallest(model)]
    with torch.no_grad(), torch_rng.kept(model.parameters()), randomness.preserved():
        torch.manual_seed(0)
        try:
            for module, _ in modes:
                module.training = False
            for p, data in moved:
                # Not in place: an open window counts the writes to its parameters.
                p.data = data + torch.randn_like(data) * (0.1 * data.square().mean().sqrt() + 0.02)
            yield
        finally:
            for p, data in moved:
                p.data = data
            for module, training in modes:
                module.training = training


def _smallest(model: nn.Module) -> Iterator[Tensor]:
    left = MOVED
    for p in sorted(model.parameters(), key=lambda p: p.numel()):
        left -= p.numel()
        if left < 0:
            return
        if p.requires_grad and p.is_floating_point() and not isinstance(p, DTensor):
            yield p


@contextlib.contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """Afterwards what the trainer has counted for its logs is as before, since a compute_loss may add to it."""
    counted = {key: value for key, value in vars(trainer).items() if isinstance(value, dict | int | float)}
    before = {key: copied for key, value in counted.items() if (copied := _copied(value)) is not None}
    try:
        yield
    finally:
        vars(trainer).update(before)


def _copied(value: Any) -> Any:
    """A copy of nested dicts and lists of numbers, strings and tensors; None of anything else."""
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.clone() if value.numel() == 1 else value
    if isinstance(value, list):
        parts = [_copied(part) for part in value]
        return None if any(part is None for part in parts) else parts
    if isinstance(value, dict):
        parts = {key: _copied(part) for key, part in value.items()}
        if any(part is None for part in parts.values()):
            return None
        copied = value.copy()  # a defaultdict stays one
        copied.update(parts)
        return copied
    return None
