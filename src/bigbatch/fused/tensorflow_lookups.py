"""Gradients of lookup tables, split into the few rows that were looked up and what is dense.

TensorFlow makes one dense gradient of a table's lookups by adding their rows to a table of zeros. Where the table is
also multiplied with, such as an embedding that is tied to the last layer, it adds that to the product. Here the rows
and the product are added to the sum one after the other, and no other tensor of the table's size is made or read.

Measured in benchmarks/tensorflow_window.md, tf1.md and keras_fit.md (the transformer). It does nothing on a GPU, where
nobody has measured it, outside a graph, and for tables with few more rows than were looked up.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.engines.tensorflow_sparse import SparseRows, merged

# Up to so many terms TensorFlow's AddN adds in order, from the first to the last.
IN_ORDER = 8

# How many times as many rows as were looked up a table must have, where the graph knows both.
LARGE = 4


class SplitGradient(NamedTuple):
    """A gradient as its terms, dense ones and `SparseRows`; their sum in this order is the gradient bit for bit."""

    terms: list[Any]

    @property
    def dtype(self) -> tf.DType:
        """Of the sum."""
        return tf.nest.flatten(self)[-1].dtype

    def added_to(self, total: tf.Tensor) -> tf.Tensor:
        """The sum of `total`, which began with `zeros`, and this. It overwrites `total`; nothing else may read that."""
        for term in self.terms:
            total = _added_in_place(total, *term) if isinstance(term, SparseRows) else total + term
        return total


def zeros(shape: Any, dtype: tf.DType) -> tf.Tensor:
    """As `tf.zeros`, for a sum that is overwritten: never a constant, which would keep what one run wrote."""
    return tf.raw_ops.Empty(shape=tf.TensorShape(shape).as_list(), dtype=dtype, init=True)


@tf.custom_gradient
def _added_in_place(total: tf.Tensor, indices: tf.Tensor, values: tf.Tensor) -> Any:
    # tf.tensor_scatter_nd_add would copy the whole table for every micro-batch.
    added = tf.raw_ops.InplaceAdd(x=total, i=tf.cast(indices, tf.int32), v=values)
    return added, lambda upstream: (upstream, None, tf.gather(upstream, indices))


def split_gradient(gradient: Any, shape: Any) -> SplitGradient | None:
    """The terms of a dense gradient of a variable of that shape, where a graph shows that some are few rows."""
    # A tensor from outside the graph has no operation.
    if not hasattr(gradient, "op") or tf.config.list_logical_devices("GPU"):
        return None
    operation = gradient.op
    while operation.type == "Identity":  # TensorFlow 1's `gate_gradients` adds one
        operation = operation.inputs[0].op
    is_sum = operation.type == "AddN" and len(operation.inputs) <= IN_ORDER
    terms = [_looked_up(term, shape) for term in (operation.inputs if is_sum else operation.outputs)]
    if not any(isinstance(term, SparseRows) for term in terms):
        return None
    return SplitGradient([merged(*term) if isinstance(term, SparseRows) else term for term in terms])


def _looked_up(term: tf.Tensor, shape: Any) -> Any:
    """The rows, where the term is few rows added to a table of zeros; else the term."""
    if term.op.type != "UnsortedSegmentSum" or not term.shape.is_compatible_with(shape):
        return term
    values, indices, _ = term.op.inputs
    rows: Any = values.shape[0]
    few = rows is None or LARGE * rows <= shape[0]
    return SparseRows(indices, values) if few and indices.shape.rank == 1 else term
