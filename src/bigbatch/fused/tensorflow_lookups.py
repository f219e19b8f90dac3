"""Gradients of tables that are looked up, taken apart: the few rows that were, and what is dense.

TensorFlow makes one dense gradient of a table's lookups by adding their rows to a table of zeros, and where the table
is multiplied with as well, as a language model's words are at both ends, adds that to the product's. Apart, the rows
are added to a sum where they belong, and nothing of the table's size is made or read for them.
"""

from typing import Any, NamedTuple

import tensorflow as tf

# As many terms TensorFlow's AddN adds up from the first to the last.
IN_ORDER = 8

# How many times as many rows a table has to have as it was looked up in, where the graph knows that.
LARGE = 4


class Rows(NamedTuple):
    """Of a table, each once."""

    indices: tf.Tensor  # shape=(rows,)
    values: tf.Tensor  # shape=(rows, …)


class Apart(NamedTuple):
    """A gradient as its terms, dense ones and `Rows`, in the order that makes their sum what it was bit for bit."""

    terms: list[Any]

    @property
    def dtype(self) -> tf.DType:
        """Of what they come to."""
        return tf.nest.flatten(self)[-1].dtype

    def added_to(self, total: tf.Tensor) -> tf.Tensor:
        """A sum that began with `zeros`, and this: it is written over `total`, which nobody else may read."""
        for term in self.terms:
            total = _added_in_place(total, *term) if isinstance(term, Rows) else total + term
        return total


def zeros(shape: Any, dtype: tf.DType) -> tf.Tensor:
    """What to begin a sum with: as tf.zeros, but never a constant, which the next run would find written over."""
    return tf.raw_ops.Empty(shape=tf.TensorShape(shape).as_list(), dtype=dtype, init=True)


@tf.custom_gradient
def _added_in_place(total: tf.Tensor, indices: tf.Tensor, values: tf.Tensor) -> Any:
    # tf.tensor_scatter_nd_add would copy the whole table for every micro-batch.
    added = tf.raw_ops.InplaceAdd(x=total, i=tf.cast(indices, tf.int32), v=values)
    return added, lambda upstream: (upstream, None, tf.gather(upstream, indices))


def merged(indices: tf.Tensor, values: tf.Tensor) -> Rows:
    """Each row once: the values of rows that are named several times are added up."""
    rows, place = tf.unique(indices)
    return Rows(rows, tf.math.unsorted_segment_sum(values, place, tf.size(rows)))


def apart(gradient: Any, shape: Any) -> Apart | None:
    """The terms of a dense gradient of a variable of that shape, where a graph shows that some are few rows."""
    # One that was made before the graph has no operation. What all this comes to on a GPU nobody has measured.
    if not hasattr(gradient, "op") or tf.config.list_logical_devices("GPU"):
        return None
    made = gradient.op
    while made.type == "Identity":  # as v1's `gate_gradients` puts one after it
        made = made.inputs[0].op
    several = made.type == "AddN" and len(made.inputs) <= IN_ORDER
    terms = [_looked_up(term, shape) for term in (made.inputs if several else made.outputs)]
    if not any(isinstance(term, Rows) for term in terms):
        return None
    return Apart([merged(*term) if isinstance(term, Rows) else term for term in terms])


def _looked_up(term: tf.Tensor, shape: Any) -> Any:
    if term.op.type != "UnsortedSegmentSum" or not term.shape.is_compatible_with(shape):
        return term
    values, indices, _ = term.op.inputs
    rows: Any = values.shape[0]
    few = rows is None or LARGE * rows <= shape[0]
    return Rows(indices, values) if few and indices.shape.rank == 1 else term
