"""What a function works on beside its arguments."""

import types
from collections.abc import Iterator
from typing import Any


def closed_over(function: types.FunctionType) -> Iterator[Any]:
    """The values of the variables that it closes over."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue


def named_globals(function: types.FunctionType) -> Iterator[Any]:
    """The values of the globals that it names."""
    yield from (function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__)
