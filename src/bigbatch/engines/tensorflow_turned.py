"""A few rows times a large matrix turned over, at which TensorFlow is slow on a CPU, computed the other way round.

The gradient of a dense layer's inputs is rows · weightsᵀ. Of (weights · rowsᵀ)ᵀ TensorFlow makes the same numbers, but
for the order in which some sums are taken, and reads the weights as they lie.
"""

import math
from typing import Any

import tensorflow as tf

# Where the other way round was quicker: not for a single row, nor for small matrices, which the transposing would cost.
LEAST = 1 << 16  # numbers in the matrix
MANY = 64  # times the rows squared is at most that


@tf.autograph.experimental.do_not_convert
def turn(graph: Any, several: Any) -> None:
    """Has all who read such a product in `graph` read it computed the other way round.

    Args:
        graph: a micro-batch's, that is being traced and has its backward pass.
        several: whether the window has more than one micro-batch: a bool, or a scalar tensor where only the run will
            tell. A window of one stays bit for bit what it is without us.
    """
    if several is False or tf.config.list_logical_devices("GPU"):
        return
    for operation in graph.get_operations():
        if not _is_slow(operation):
            continue
        (rows, weights), product = operation.inputs, operation.outputs[0]
        readers = [(reader, i) for reader in product.consumers() for i, x in enumerate(reader.inputs) if x is product]

        def turned(rows: Any = rows, weights: Any = weights) -> tf.Tensor:
            return tf.transpose(tf.linalg.matmul(weights, rows, transpose_b=True))

        def plain(rows: Any = rows, weights: Any = weights) -> tf.Tensor:
            return tf.linalg.matmul(rows, weights, transpose_b=True)

        other = turned() if several is True else tf.cond(several, turned, plain)
        for reader, i in readers:
            # Nothing public changes who reads what. tests/tensorflow/test_turned.py fails when this moves.
            reader._update_input(i, other)


def _is_slow(operation: Any) -> bool:
    if operation.type != "MatMul":
        return False
    if (operation.get_attr("transpose_a"), operation.get_attr("transpose_b")) != (False, True):
        return False
    rows, weights = (side.shape for side in operation.inputs)
    if not (rows.is_fully_defined() and weights.is_fully_defined()):
        return False
    return rows[0] > 1 and math.prod(weights.as_list()) >= max(LEAST, MANY * rows[0] ** 2)
