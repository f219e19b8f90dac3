"""Products with a large transposed matrix, computed without transposing it.

The gradient of a dense layer's inputs is rows · weightsᵀ, at which TensorFlow is slow on a CPU. (weights · rowsᵀ)ᵀ is
the same, but for the order of some sums, and reads the weights as they are stored. Where a model transposes its weights
itself, such as an embedding that is tied to the last layer, the same holds for the layer's outputs, and the gradient of
its inputs is rows · weights. The gradient of such weights is (leftᵀ · right)ᵀ, which is rightᵀ · left.

Measured in benchmarks/tensorflow_window.md and keras_fit.md (micro-batches of 16 and less). It does nothing on a GPU,
under XLA, for matrices of less than `LEAST` numbers, for micro-batches of many rows, and in a window of one
micro-batch, which stays bit for bit the plain step.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from bigbatch.fused.tensorflow_deferred import factors_of
from bigbatch.fused.tensorflow_rewrite import read, replace

# Below these sizes, and for a single row, the transposition of the result costs more than it saves.
LEAST = 1 << 16  # numbers in the matrix
MANY = 64  # times the rows squared is at most the numbers in the matrix

# How to compute one product: as the graph does, and without transposing the large matrix.
PlainAndFast = tuple[Callable[[], tf.Tensor], Callable[[], tf.Tensor]]


@tf.autograph.experimental.do_not_convert
def with_fast_products(graph: Any, several: Any, gradients: Any) -> Any:
    """Makes all operations that read such a product in `graph` read it computed the fast way.

    Args:
        graph: a micro-batch's, that is being traced and has its backward pass.
        several: whether the window has more than one micro-batch: a bool, or a scalar tensor where only the run will
            tell. A window of one stays bit for bit the plain step.
        gradients: the results of the backward pass, nested in any way, and None; empty where operations of the graph
            have read them already.

    Returns:
        The gradients, computed the fast way.
    """
    if several is False or tf.config.list_logical_devices("GPU"):
        return gradients
    gradients = read(gradients)
    for operation in graph.get_operations():
        if _has_few_rows(operation):
            plain, fast = _with_few_rows(*operation.inputs, transposed=operation.get_attr("transpose_b"))
        elif _is_transposed_gradient(operation):
            plain, fast = _transposed_gradient(*operation.inputs[0].op.inputs)
        else:
            continue
        either = functools.partial(tf.cond, several, fast, plain)
        replace(operation.outputs[0], fast if several is True else either)
    return gradients


def _with_few_rows(rows: tf.Tensor, weights: tf.Tensor, transposed: bool) -> PlainAndFast:
    if not _is_transposition(weights.op):
        return (
            lambda: tf.linalg.matmul(rows, weights, transpose_b=transposed),
            lambda: _times_transposed(rows, weights),
        )
    (matrix, _) = weights.op.inputs
    return (
        # Not of `weights` itself: a conditional would compute that transposition for both branches.
        lambda: tf.linalg.matmul(rows, tf.transpose(matrix), transpose_b=transposed),
        lambda: tf.linalg.matmul(rows, matrix) if transposed else _times_transposed(rows, matrix),
    )


def _times_transposed(rows: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    """The rows times weightsᵀ."""
    return tf.transpose(tf.linalg.matmul(weights, rows, transpose_b=True))


def _has_few_rows(operation: Any) -> bool:
    """Whether it is a product of few rows and a large transposed matrix."""
    if operation.type != "MatMul" or operation.get_attr("transpose_a"):
        return False
    rows, weights = (side.shape for side in operation.inputs)
    if not (rows.is_fully_defined() and weights.is_fully_defined()):
        return False
    few = rows[0] > 1 and math.prod(weights.as_list()) >= max(LEAST, MANY * rows[0] ** 2)
    return few and (operation.get_attr("transpose_b") or _is_transposition(operation.inputs[1].op))


def _transposed_gradient(left: tf.Tensor, right: tf.Tensor) -> PlainAndFast:
    return (
        lambda: tf.transpose(tf.linalg.matmul(left, right, transpose_a=True)),
        lambda: tf.linalg.matmul(right, left, transpose_a=True),
    )


def _is_transposed_gradient(operation: Any) -> bool:
    """Whether it transposes a product of two factors, to a large gradient."""
    if not _is_transposition(operation) or factors_of(operation.inputs[0]) is None:
        return False
    shape = operation.outputs[0].shape
    return shape.is_fully_defined() and math.prod(shape.as_list()) >= LEAST


def _is_transposition(operation: Any) -> bool:
    """Whether it transposes a matrix."""
    if operation.type != "Transpose":
        return False
    order = operation.inputs[1]
    if order.op.type == "InvertPermutation":  # the gradient of a transposition; of two axes it is its own
        (order,) = order.op.inputs
    axes = tf.get_static_value(order)
    return axes is not None and list(axes) == [1, 0]
