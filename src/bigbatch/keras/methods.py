"""Methods of a model, a layer, an optimizer or a variable, replaced for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(methods: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Replaces methods of single objects, given as (object, name, method); restores them in the end.

    Not by setattr, which Keras overrides to track attributes. A method is looked up in the object's `__dict__` first.
    """
    before = [(owner, name, owner.__dict__.get(name)) for owner, name, _ in methods]
    try:
        for owner, name, method in methods:
            owner.__dict__[name] = method
        yield
    finally:
        for owner, name, own in reversed(before):
            owner.__dict__.pop(name, None)
            if own is not None:
                owner.__dict__[name] = own
