"""Products in which a large matrix is turned over, at which TensorFlow is slow on a CPU, the other way round.

The gradient of a dense layer's inputs is rows · weightsᵀ. Of (weights · rowsᵀ)ᵀ TensorFlow makes the same numbers, but
for the order in which some sums are taken, and reads the weights as they lie. Where a model turns its weights over
first, as the table of words that its last layer is tied to, the same is true of the layer itself, and the gradient of
its inputs is rows · weights. The gradient of such weights is (leftᵀ · right)ᵀ: that is rightᵀ · left.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from bigbatch.fused.tensorflow_deferred import factors_of
from bigbatch.fused.tensorflow_rewrite import read, replace

# Where the other way round was quicker: not for a single row, nor for small matrices, which the transposing would cost.
LEAST = 1 << 16  # numbers in the matrix
MANY = 64  # times the rows squared is at most that

# As it is, and the other way round.
Ways = tuple[Callable[[], tf.Tensor], Callable[[], tf.Tensor]]


@tf.autograph.experimental.do_not_convert
def turn(graph: Any, several: Any, gradients: Any) -> Any:
    """Has all who read such a product in `graph` read it computed the other way round.

    Args:
        graph: a micro-batch's, that is being traced and has its backward pass.
        several: whether the window has more than one micro-batch: a bool, or a scalar tensor where only the run will
            tell. A window of one stays bit for bit what it is without us.
        gradients: what the backward pass made, nested in any way, and None; nothing where all who read them are there.

    Returns:
        The gradients, computed so.
    """
    if several is False or tf.config.list_logical_devices("GPU"):
        return gradients
    gradients = read(gradients)
    for operation in graph.get_operations():
        if _is_of_few_rows(operation):
            plain, turned = _of_few_rows(*operation.inputs, transposed=operation.get_attr("transpose_b"))
        elif _is_of_turned_weights(operation):
            plain, turned = _of_turned_weights(*operation.inputs[0].op.inputs)
        else:
            continue
        either = functools.partial(tf.cond, several, turned, plain)
        replace(operation.outputs[0], turned if several is True else either)
    return gradients


def _of_few_rows(rows: tf.Tensor, weights: tf.Tensor, transposed: bool) -> Ways:
    if not _is_transposition(weights.op):
        return (
            lambda: tf.linalg.matmul(rows, weights, transpose_b=transposed),
            lambda: _over(rows, weights),
        )
    (matrix, _) = weights.op.inputs
    return (
        # Not of `weights` itself: a conditional would have it turned over beforehand, for either way.
        lambda: tf.linalg.matmul(rows, tf.transpose(matrix), transpose_b=transposed),
        lambda: tf.linalg.matmul(rows, matrix) if transposed else _over(rows, matrix),
    )


def _over(rows: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """Rows · weightsᵀ."""
    return tf.transpose(tf.linalg.matmul(weights, rows, transpose_b=True))


def _is_of_few_rows(operation: Any) -> bool:
    if operation.type != "MatMul" or operation.get_attr("transpose_a"):
        return False
    rows, weights = (side.shape for side in operation.inputs)
    if not (rows.is_fully_defined() and weights.is_fully_defined()):
        return False
    few = rows[0] > 1 and math.prod(weights.as_list()) >= max(LEAST, MANY * rows[0] ** 2)
    return few and (operation.get_attr("transpose_b") or _is_transposition(operation.inputs[1].op))


def _of_turned_weights(left: tf.Tensor, right: tf.Tensor) -> Ways:
    return (
        lambda: tf.transpose(tf.linalg.matmul(left, right, transpose_a=True)),
        lambda: tf.linalg.matmul(right, left, transpose_a=True),
    )


def _is_of_turned_weights(operation: Any) -> bool:
    if not _is_transposition(operation) or factors_of(operation.inputs[0]) is None:
        return False
    shape = operation.outputs[0].shape
    return shape.is_fully_defined() and math.prod(shape.as_list()) >= LEAST


def _is_transposition(operation: Any) -> bool:
    """Whether it turns a matrix over."""
    if operation.type != "Transpose":
        return False
    order = operation.inputs[1]
    if order.op.type == "InvertPermutation":  # the gradient of a transposition; of two axes it is its own
        (order,) = order.op.inputs
    axes = tf.get_static_value(order)
    return axes is not None and list(axes) == [1, 0]
