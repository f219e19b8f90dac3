"""The state of TensorFlow's chance, which an audit gives back."""

import contextlib
from collections.abc import Iterator
from typing import Any

# Nothing public gives it back. tests/tensorflow/test_audit.py and tests/keras/test_audit.py fail if this moves.
from tensorflow.python.eager import context


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """What `tf.random` draws from is afterwards what it was."""
    held: Any = context.context()
    seed, rng = held._seed, getattr(held, "_rng", None)
    drawn = None if rng is None else rng.getstate()
    try:
        yield
    finally:
        held._seed, held._rng = seed, rng
        if rng is not None:
            rng.setstate(drawn)
