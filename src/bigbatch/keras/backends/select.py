"""The module of the backend that Keras runs on."""

import importlib
from typing import Any

import keras

# The module that has each backend's steps.
_STEPS = {"jax": "window", "tensorflow": "steps", "torch": "window"}


def backend() -> Any:
    """The module with the steps for the backend that Keras runs on."""
    name = keras.backend.backend()
    return importlib.import_module(f"bigbatch.keras.backends.{name}.{_STEPS[name]}")


def whole_batch_backend() -> Any:
    """The module with the steps whose loss is over the whole batch."""
    return importlib.import_module(f"bigbatch.keras.backends.{keras.backend.backend()}.chunked")
