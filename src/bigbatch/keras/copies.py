"""What becomes of accumulation in a copy of the model.

`copy` and `pickle` ask the model how it is made again, and the answer holds `accumulate`. `clone_model` asks nothing
of the kind, so there a warning says that the clone does not accumulate. A file from `model.save` is Keras's own.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any

# Not public: the module that is found on the stack while a model is cloned. tests/keras/test_private.py fails when it
# moves.
from keras.src.models import cloning


def attach(model: Any, again: Callable[..., Any], options: dict[str, Any]) -> None:
    """Has copies of the model accumulate, or say that they do not.

    Args:
        model: an accumulated model.
        again: makes another model accumulate.
        options: what it is given beside the model.
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
