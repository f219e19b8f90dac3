"""Makes the operations of a graph that is being traced read one tensor in place of another."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def replace(tensor: tf.Tensor, make: Callable[[], tf.Tensor]) -> None:
    """Makes all operations that have read `tensor` so far read what `make` returns, which may read `tensor` itself.

    `make` is not called where nothing reads the tensor, such as the gradient of a first layer's inputs.
    """
    readers = [(reader, i) for reader in tensor.consumers() for i, x in enumerate(reader.inputs) if x is tensor]
    if not readers:
        return
    new = make()
    for reader, i in readers:
        # No public function changes an operation's input: tests/tensorflow/test_private.py.
        reader._update_input(i, new)


def read(gradients: Any) -> Any:
    """The same gradients, nested in any way, each through an operation that reads it; None stays None.

    A graph's outputs are no operation, so `replace` would not change them.
    """
    return tf.nest.map_structure(lambda g: None if g is None else tf.identity(g), gradients)
