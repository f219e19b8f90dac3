"""Accumulation in copies of the model.

`copy` and `pickle` call the model's `__reduce__`, whose result makes the copy accumulate. `clone_model` calls nothing
of that kind, so a warning states that the clone does not accumulate. A file from `model.save` is Keras's own.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

# Not public: the module that is found on the stack while a model is cloned. tests/keras/test_private.py fails when it
# moves.
from keras.src.models import cloning


def attach(model: Any, again: Callable[..., Any], options: dict[str, Any]) -> None:
    """Makes copies of the model accumulate, and clones warn that they do not.

    Args:
        model: an accumulated model.
        again: makes another model accumulate.
        options: its arguments beside the model.
    """

    def reduce() -> tuple[Any, ...]:
        kind: Any = type(model)
        make, arguments = kind.__reduce__(model)
        return _made_again, (make, arguments, again, options)

    def get_compile_config() -> Any:
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_globals is not vars(cloning):
            frame = frame.f_back
        if frame is not None:
            warnings.warn(
                f"The clone of {model.name} does not accumulate. Call bigbatch.keras.accumulate on it as well.",
                stacklevel=2,
            )
        return type(model).get_compile_config(model)

    model.__dict__["__reduce__"] = reduce
    model.get_compile_config = get_compile_config


def _made_again(make: Callable[..., Any], arguments: Any, again: Callable[..., Any], options: dict[str, Any]) -> Any:
    return again(make(*arguments), **options)
