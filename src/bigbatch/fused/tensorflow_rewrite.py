"""Who reads a tensor of a graph that is being traced, and how they come to read another in its place."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def replace(tensor: tf.Tensor, make: Callable[[], tf.Tensor]) -> None:
    """Has all operations that read `tensor` so far read what `make` returns, which may read it itself.

    Nothing is made where nobody does, as of a first layer's inputs' gradient.
    """
    readers = [(reader, i) for reader in tensor.consumers() for i, x in enumerate(reader.inputs) if x is tensor]
    if not readers:
        return
    new = make()
    for reader, i in readers:
        # Nothing public changes who reads what. tests/tensorflow/test_turned.py fails when this moves.
        reader._update_input(i, new)


def read(gradients: Any) -> Any:
    """The same gradients, nested in any way, and None, each read by an operation: those of a graph's results too."""
    return tf.nest.map_structure(lambda g: None if g is None else tf.identity(g), gradients)
