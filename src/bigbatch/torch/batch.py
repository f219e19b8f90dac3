"""A batch, nested as its user has it: its leaves, and the same nesting of parts of them."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

from bigbatch import errors


def is_text(value: Any) -> bool:
    """Whether it is a list or tuple of text (captions, ids), one for each example; None stands for a missing one."""
    kinds = (str, bytes, type(None))
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], kinds) or hasattr(value, "_fields"):
        return False
    return all(isinstance(text, kinds) for text in value) and any(text is not None for text in value)


def children_of(batch: Any) -> list[tuple[str, Any, Any]] | None:
    """The parts of one level of nesting, each as (how it is written after the parent, its key, itself)."""
    if isinstance(batch, Mapping):
        return [(f"[{key!r}]", key, value) for key, value in batch.items()]
    if isinstance(batch, tuple | list):
        return [(f"[{i}]", i, value) for i, value in enumerate(batch)]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [(f".{f.name}", f.name, getattr(batch, f.name)) for f in dataclasses.fields(batch)]
    return None


def leaves(batch: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every tensor of a batch, and every list of text, with the place where it stands."""
    children = None if is_text(batch) else children_of(batch)
    if children is not None:
        for written, _, child in children:
            yield from leaves(child, where + written)
    elif (isinstance(batch, Tensor) and batch.ndim > 0) or is_text(batch):
        yield where, batch
    elif batch is not None:
        raise errors.leaf_without_length(where, batch)


def cut(batch: Any, start: int, stop: int) -> Any:
    """The same nesting with every leaf cut to examples start … stop - 1, tensors as views."""
    if type(batch) is tuple and not is_text(batch):  # the commonest batch, by the shortest way
        return tuple([cut(child, start, stop) for child in batch])
    return mapped(batch, lambda leaf: leaf[start:stop])


def mapped(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting with every leaf changed."""
    if isinstance(batch, Tensor) or is_text(batch):
        return change(batch)
    children = children_of(batch)
    if children is None:
        return batch
    parts = {key: mapped(child, change) for _, key, child in children}
    if isinstance(batch, Mapping):
        if not isinstance(batch, MutableMapping):
            return parts
        # A copy that is written into keeps the class and what else it holds: BatchEncoding, OrderedDict, UserDict.
        part = copy.copy(batch)
        part.update(parts)
        return part
    if isinstance(batch, list):
        return list(parts.values())
    if isinstance(batch, tuple):
        return type(batch)(*parts.values()) if hasattr(batch, "_fields") else tuple(parts.values())
    part = copy.copy(batch)
    for name, value in parts.items():
        object.__setattr__(part, name, value)  # frozen ones too, and no __init__ that would expect the whole batch
    return part
