"""What is asked of a loss and of its items: at the door in the words of `bigbatch.errors`, and in the graph too."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

# Nothing public tells that a graph is traced for jit_compile=True. tests/tensorflow/test_xla.py fails if this moves.
from tensorflow.python.ops import control_flow_util

from bigbatch import errors

# Counts of items, and losses weighted by them: exact for integers up to 2^53, where a sum in bf16 would stop at 256.
COUNT = tf.float64


def under_xla() -> bool:
    """Whether the graph being traced is for XLA, which knows no strings and no shapes that depend on values."""
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def check_loss(loss: Any) -> tf.Tensor:
    """Accepts a scalar of a floating dtype."""
    if not tf.is_tensor(loss) or not loss.dtype.is_floating or loss.shape.rank not in (0, None):
        raise errors.loss_not_scalar(loss)
    return loss


def as_items(items: Any) -> tf.Tensor:
    """Accepts a number above zero, or a tensor of one element, whose value `checked` sees when the graph runs."""
    if not tf.is_tensor(items):
        return tf.constant(errors.check_items(items), COUNT)
    if not (items.dtype.is_floating or items.dtype.is_integer) or items.shape.num_elements() not in (1, None):
        errors.check_items(items)  # says what a number is
    return items


def checked(items: tf.Tensor) -> tf.Tensor:
    """The count as a `COUNT` scalar. Nothing that is computed from it runs if it is not above zero and finite."""
    items = tf.reshape(items, ())
    count = tf.cast(items, COUNT)
    finite = tf.math.is_finite(count)

    def wrong() -> tf.Tensor:
        shown = tf.strings.as_string(items) if items.dtype.is_integer else tf.strings.as_string(items, shortest=True)
        kind = f"({items.dtype.name})"
        not_positive = words(lambda: errors.check_items(-1), {"-1": shown, "(int)": kind})
        return tf.where(
            finite, not_positive, words(lambda: errors.check_items(math.inf), {"inf": shown, "(float)": kind})
        )

    with tf.control_dependencies([require(tf.logical_and(finite, count > 0), wrong)]):
        return tf.identity(count)


def require(holds: tf.Tensor, wrong: Callable[[], tf.Tensor]) -> Any:
    """An op that raises `tf.errors.InvalidArgumentError` where `holds` is false. XLA makes no such checks."""
    if under_xla():
        return tf.no_op()
    return tf.cond(holds, tf.no_op, lambda: tf.raw_ops.Assert(condition=False, data=[wrong()], summarize=1))


def words(mistake: Callable[[], Any], shown: Mapping[str, Any] = {}) -> tf.Tensor:
    """What `bigbatch.errors` says of a mistake, with what only the graph knows in the place of the numbers tried."""
    try:
        mistake()
    except ValueError as error:
        text = str(error)
    else:
        raise ValueError("no mistake")
    pieces = [text]
    for tried, value in shown.items():
        before, after = pieces.pop().split(tried, 1)
        value = tf.strings.as_string(value) if tf.is_tensor(value) and value.dtype != tf.string else value
        pieces += [before, value, after]
    return tf.strings.join(pieces)
