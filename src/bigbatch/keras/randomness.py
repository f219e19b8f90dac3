"""The random state of Keras, its backend, NumPy and Python, which an experiment restores."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import keras

# Not public: the generator that draws where a seed is None. tests/keras/test_private.py fails when it moves.
from keras.src.backend.common import global_state

from bigbatch.engines import randomness

_GENERATOR = "global_seed_generator"  # Keras has a constant for it from 3.13 on


@contextlib.contextmanager
def preserved(model: Any) -> Iterator[None]:
    """Afterwards all random numbers are those that would have been drawn before."""
    generator = global_state.get_global_attribute(_GENERATOR)
    try:
        with randomness.preserved(), _backend(model):
            yield
    finally:
        global_state.set_global_attribute(_GENERATOR, generator)


def _backend(model: Any) -> contextlib.AbstractContextManager[None]:
    """Preserves what the backend draws from beside Keras's seeds; JAX draws from keys alone."""
    name = keras.backend.backend()
    if name == "jax":
        return contextlib.nullcontext()
    engine: Any = importlib.import_module(f"bigbatch.engines.{name}_rng")
    return engine.kept([v.value for v in model.variables]) if name == "torch" else engine.kept()
