"""The state of TensorFlow's random generator, which an audit restores."""

import contextlib
from collections.abc import Iterator
from typing import Any

# Nothing public restores it: tests/tensorflow/test_private.py.
from tensorflow.python.eager import context


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Afterwards `tf.random` draws what it would have drawn before."""
    state: Any = context.context()
    seed, rng = state._seed, getattr(state, "_rng", None)
    drawn = None if rng is None else rng.getstate()
    try:
        yield
    finally:
        state._seed, state._rng = seed, rng
        if rng is not None:
            rng.setstate(drawn)
