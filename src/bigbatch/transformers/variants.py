"""Batches in two parts, on which the candidates for a loss's items differ.

The rows are the micro-batch's own. Where it has one row only, or rows of one length, labels and masks are edited, which
makes other rows of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbatch.transformers.counts import IGNORED, is_labels, is_mask, length_of

Inputs = dict[str, Any]


class Parted(NamedTuple):
    """A batch and its two parts, of which it has every row once."""

    whole: Inputs
    first: Inputs
    second: Inputs


def variants(inputs: Mapping[str, Any]) -> list[Parted]:
    """The batches that an experiment compares; as many on every rank, whose forwards may be collective."""
    units = max(1, length_of(inputs) // halves(inputs))
    own = list(range(units)) if units > 1 else [0, 0]
    last = units - 1
    return [
        parted(select(inputs, own), len(own) // 2, len(own)),
        parted(_edited(select(inputs, [0, last]), 1, 2, kept=3), 1, 2),
        parted(_edited(select(inputs, [last, 0, units // 2]), 1, 3, kept=2), 1, 3),
    ]


def halves(inputs: Mapping[str, Any]) -> int:
    """2 where an even number of rows may be pairs, as in preference data: those chosen first, then those rejected.

    Where they are no pairs, two of them may be taken together as well.
    """
    return 2 if length_of(inputs) % 2 == 0 else 1


def select(inputs: Mapping[str, Any], units: Sequence[int]) -> Inputs:
    """These examples or pairs, in this order."""
    length = length_of(inputs)
    step = length // halves(inputs)
    rows = [unit + offset for offset in range(0, length, step) for unit in units]
    return {key: _rows(value, rows, list(units), length, step) for key, value in inputs.items()}


def parted(whole: Inputs, at: int, units: int) -> Parted:
    """Cut after `at` of its units."""
    length = length_of(whole)
    parts = []
    for part in (list(range(at)), list(range(at, units))):
        rows = [unit + offset for offset in range(0, length, units) for unit in part]
        parts.append({key: _rows(value, rows, part, length, units) for key, value in whole.items()})
    return Parted(whole, *parts)


def _rows(value: Any, rows: list[int], units: list[int], length: int, step: int) -> Any:
    """Those rows; of what has one entry a pair, those units."""
    entries = len(value) if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim) else None
    if entries not in (length, step):
        return value
    chosen = rows if entries == length else units
    return [value[i] for i in chosen] if isinstance(value, list) else value[torch.tensor(chosen, device=value.device)]


def _edited(whole: Inputs, at: int, units: int, *, kept: int) -> Inputs:
    """So that labels, masks and examples have different shares in the two parts.

    The first part keeps two labels a row, one of them at position 0, and the second `kept`, none of them there. The
    second part's masks are shorter, its class labels others, and its tokens in another order.
    """
    edited, shorter = dict(whole), 0
    for key, value in whole.items():
        if is_labels(key, value) and value.ndim == 2:
            edited[key] = _few_labels(value, at, units, kept)
        elif is_labels(key, value) and value.ndim == 1:
            edited[key] = _other_classes(value, at, units)
        elif key.endswith("input_ids") and isinstance(value, Tensor) and value.ndim == 2:
            edited[key] = torch.where(_is_second(value, at, units)[:, None], value.roll(1, dims=1), value)
        elif is_mask(key, value):
            shorter += 1
            edited[key] = _shorter(value, at, units, keep=1 / (1 + shorter))
        elif isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point():
            # Advantages or scores, which may all be equal, and the loss then constant.
            edited[key] = value + torch.arange(len(value), device=value.device).to(value.dtype) % units - 0.7
    return edited


def _few_labels(labels: Tensor, at: int, units: int, kept: int) -> Tensor:
    edited = torch.full_like(labels, IGNORED)
    for row, old in enumerate(labels):
        valid = (old[1:] != IGNORED).nonzero().flatten() + 1
        if len(valid) < 2:  # too few to choose from
            edited[row] = old
            continue
        first = row % units < at
        chosen = valid[:1] if first else valid[:kept]
        edited[row, chosen] = old[chosen]
        if first:
            edited[row, 0] = old[0] if old[0] != IGNORED else old[valid[0]]
    return edited


def _other_classes(labels: Tensor, at: int, units: int) -> Tensor:
    """In the second part with a neighbouring class, so that copies of one example have another loss."""
    other = torch.where(labels > 0, labels - 1, labels + 1)
    return torch.where(_is_second(labels, at, units) & (labels != IGNORED), other, labels)


def _is_second(value: Tensor, at: int, units: int) -> Tensor:
    return torch.arange(len(value), device=value.device) % units >= at


def _shorter(mask: Tensor, at: int, units: int, keep: float) -> Tensor:
    """In the second part, with a fraction of the positions; each mask with another."""
    edited = mask.clone()
    for row, old in enumerate(mask):
        valid = old.nonzero().flatten()
        if row % units >= at and len(valid) > 2:
            edited[row, valid[max(1, round(len(valid) * keep)) :]] = 0
    return edited
