"""The random state of Keras, its backend, NumPy and Python, which an experiment gives back."""

import contextlib
import importlib
import random
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

# Not public: the generator that draws where a seed is None. tests/keras/test_private.py fails when they move.
from keras.src.backend.common import global_state
from keras.src.random import seed_generator


@contextlib.contextmanager
def kept(model: Any) -> Iterator[None]:
    """What random numbers are drawn from is afterwards what it was."""
    own = importlib.import_module(f"bigbatch.keras.backends.{keras.backend.backend()}.audit")
    python, numpy = random.getstate(), np.random.get_state()
    generator = global_state.get_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR)
    try:
        with own.chance_kept(model):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        global_state.set_global_attribute(seed_generator.GLOBAL_SEED_GENERATOR, generator)
