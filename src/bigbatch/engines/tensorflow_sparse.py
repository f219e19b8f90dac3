"""Gradients that may be sparse: their sum, scale and dtype, and rows that are named several times."""

from typing import Any, NamedTuple

import tensorflow as tf

Gradient = tf.Tensor | tf.IndexedSlices


class SparseRows(NamedTuple):
    """Some rows of a table: which ones, and their values."""

    indices: tf.Tensor  # shape=(rows,)
    values: tf.Tensor  # shape=(rows, …)


def merged(indices: tf.Tensor, values: tf.Tensor) -> SparseRows:
    """Each row once: the values of rows that are named several times are added up."""
    rows, place = tf.unique(indices)
    return SparseRows(rows, tf.math.unsorted_segment_sum(values, place, tf.size(rows)))


def add(a: Any, b: Any) -> Any:
    """The sum of two gradients, tensors or `SparseRows`, either of which may be missing."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, SparseRows):
        return merged(tf.concat([a.indices, b.indices], 0), tf.concat([a.values, b.values], 0))
    return a + b


def cast(gradient: Gradient, dtype: tf.DType) -> Any:
    """The gradient in another dtype, sparse if it was."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape)
    return tf.cast(gradient, dtype)


def scaled(gradient: Gradient, factor: tf.Tensor) -> Any:
    """The gradient times a scalar of any dtype, sparse if it was."""
    factor = tf.cast(factor, gradient.dtype)
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values * factor, gradient.indices, gradient.dense_shape)
    return gradient * factor


def add_scaled(total: tf.Variable, gradient: Any, weight: tf.Tensor) -> tf.Operation:
    """Adds weight · gradient, dense, `SparseRows` or `tf.IndexedSlices` of the variable's dtype, in one pass."""
    if isinstance(gradient, SparseRows | tf.IndexedSlices):
        updates = gradient.values * weight
        return tf.raw_ops.ResourceScatterAdd(resource=total.handle, indices=gradient.indices, updates=updates)
    # total -= (-weight) · gradient: the one operation that adds a multiple without a temporary.
    return tf.raw_ops.ResourceApplyGradientDescent(var=total.handle, alpha=-weight, delta=gradient)
