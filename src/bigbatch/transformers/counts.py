"""What a micro-batch's loss may be the mean of, counted in the inputs that the model is given."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

IGNORED = -100
"""The label that Hugging Face's losses leave out, and `cross_entropy` by default."""

SUM = "nothing: it is a sum"

Count = Callable[[Mapping[str, Any]], Any]


def candidates(inputs: Mapping[str, Any]) -> dict[str, Count]:
    """What can be counted in such inputs, by name, the likeliest first. Counts are numbers, or tensors on the device.

    The keys of labels and masks are Hugging Face's. A loss that shifts its labels leaves the first position out.
    """
    counts: dict[str, Count] = {}
    labels = {key: value for key, value in inputs.items() if is_labels(key, value)}
    for key, value in labels.items():
        if value.ndim > 1 and key != "shift_labels":
            counts[f"{key}[:, 1:] != {IGNORED}"] = lambda given, key=key: (given[key][..., 1:] != IGNORED).sum()
        counts[f"{key} != {IGNORED}"] = lambda given, key=key: (given[key] != IGNORED).sum()
    # Among class labels, one an example, `IGNORED` can only mean that the example is left out.
    if not any(value.ndim == 1 for value in labels.values()):
        counts["the examples"] = lambda given: length_of(given)
    for key, value in inputs.items():
        if is_mask(key, value):
            counts[key] = lambda given, key=key: given[key].sum()
            counts[f"{key}[:, 1:]"] = lambda given, key=key: given[key][:, 1:].sum()
    counts[SUM] = lambda given: 1
    return counts


def is_labels(key: str, value: Any) -> bool:
    """Whether it holds class labels: integers, one an example or one a position."""
    return key in ("labels", "shift_labels", "label") and isinstance(value, Tensor) and _is_integer(value)


def has_no_labels(inputs: Mapping[str, Any]) -> bool:
    """Whether there are labels, and all are left out. Here the host waits for the device."""
    labels = [value for key, value in inputs.items() if is_labels(key, value)]
    return bool(labels) and not any(bool((value != IGNORED).any()) for value in labels)


def is_mask(key: str, value: Any) -> bool:
    """Whether it says which positions count."""
    return key.endswith("mask") and isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()


def length_of(inputs: Mapping[str, Any]) -> int:
    """How many examples there are: the leading dimension that most tensors have."""
    lengths = [len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim]
    return max(set(lengths), key=lambda length: (lengths.count(length), length), default=0)


def _is_integer(value: Tensor) -> bool:
    return value.ndim > 0 and not value.is_floating_point() and not value.is_complex()
