"""Whether the trained variables are what they were when the window opened.

Nothing tells a graph that somebody assigned a variable. So the first micro-batch of a window notes a fingerprint of
the variables' bytes, and the close compares: twice a window, and never in a micro-batch between.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from bigbatch.tf1.checks import require

# A variable of more numbers than LARGE is compared at SAMPLE of them, equally spaced: any optimizer's step moves some.
LARGE, SAMPLE = 2**18, 2**14


def fingerprint(trained: Sequence[tuple[Any, bool]]) -> tf.Tensor:
    """A whole number below 2⁵² as a float64 scalar, of (variable, whether its gradient is sparse) in any order.

    It depends on bytes alone, so that a checkpoint's is the same in another process and on another device.
    """
    total = tf.constant(0, tf.int64)
    with tf.device("/cpu:0"):  # where the kernel is
        for variable, is_sparse in trained:
            data = tf.reshape(_numbers(variable, is_sparse), [1, -1])
            bytes_of_hash = tf.raw_ops.Fingerprint(data=data, method="farmhash64")
            # An odd factor of its own for each variable: two that swap their values are noticed.
            total += tf.bitcast(bytes_of_hash[0], tf.int64) * (zlib.crc32(variable.op.name.encode()) | 1)
        return tf.cast(tf.bitwise.bitwise_and(total, 2**52 - 1), tf.float64)


def _numbers(variable: Any, is_sparse: bool) -> tf.Tensor:
    """All numbers of a small variable, some of a large one."""
    shape = variable.shape.as_list()
    size = math.prod(shape)
    if size <= LARGE:
        return variable.read_value()
    step = math.ceil(size / SAMPLE) | 1  # odd, or it would keep to some columns of the usual widths
    if is_sparse and variable.op.type == "VarHandleOp":
        # Reading a table that was scattered into copies it whole.
        places = tf.unravel_index(tf.range(0, size, step, tf.int64), tf.constant(shape, tf.int64))
        return variable.gather_nd(tf.transpose(places))
    return tf.reshape(variable.read_value(), [-1])[::step]


def require_unchanged(mark: tf.Tensor, now: Callable[[], tf.Tensor]) -> tf.Operation:
    """An op that raises where the fingerprint is not the one that the window opened with."""
    return require(
        tf.equal(mark, now()),
        "The variables changed inside the open window, and not by this Accumulator: an optimizer's own minimize or "
        "apply_gradients ran, or an assign, an initializer, a restore, or another Accumulator with the same variables. "
        "Its micro-batches saw different variables, so the window was dropped. The variables and the optimizer are as "
        "that left them. Remove that step, or end the window before it with session.run(acc.flush).",
    )
