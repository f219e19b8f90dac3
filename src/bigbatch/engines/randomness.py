"""The random state of Python and NumPy, which loaders and augmentations draw from."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Afterwards Python and NumPy draw what they would have drawn before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
