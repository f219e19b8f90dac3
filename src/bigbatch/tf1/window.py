"""The open window's scalars, what the last one came to, and the lock that all who change them take.

What a graph can and cannot order shapes this file. Ops that are fetched together run in no order but that of their
inputs, and an op that needs no feed cannot wait for one that does. So readings are taken before anything changes, and
of two ops that change a window in one run the second is refused, whichever it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.tf1.checks import require

v1 = tf.compat.v1

APPLIED, NOT_FINITE, CARRIED, DROPPED = range(4)


class Update(NamedTuple):
    """What the last window came to, as tensors: `session.run(acc.last)` gives an `Update` of numbers.

    Attributes:
        index: the update's index, from 0, int64; a skipped window leaves it for the next.
        micro_batches: how many micro-batches the window held, int64.
        items: the examples or tokens that they counted for, float64.
        loss: the window's mean loss over items, float64; NaN where `apply_gradients` was given none.
        grad_norm: the 2-norm of the window's gradient, before clipping, float64; NaN where none was taken.
        skipped: why no update was made, a string; empty where it was.
    """

    index: Any
    micro_batches: Any
    items: Any
    loss: Any
    grad_norm: Any
    skipped: Any


class Scalars(NamedTuple):
    """An open window's, all float64, which counts exactly to 2⁵³: one variable, so one read and one write."""

    micro_batches: Any
    items: Any
    unit: Any  # the first micro-batch's items; sums are kept divided by it, so that a window of one is only itself
    loss: Any  # Σ nᵢ·lossᵢ / unit


class Window:
    """The variables of a window, saved and initialized with the model's, on the CPU.

    Attributes:
        pending, pending_items, updates, last: readings, as a run finds them.
        variables: what the readings read, and the run that changed them last.
    """

    def __init__(self):
        with tf.device("/cpu:0"):
            self._open = _variable(tf.float64, (len(Scalars._fields),), "window")
            self._report = _variable(tf.float64, (len(Update._fields),), "last")
            self._updates = _variable(tf.int64, (), "updates")
            self._run = _variable(tf.float64, (), "run")
            self._stamp = tf.timestamp()  # once a run, for all that is fetched in it
            name = tf.raw_ops.NoOp(name="lock").name  # unique in the graph, and the same in the next process
            self._mutex = tf.raw_ops.MutexV2(shared_name=name)
            initialized = require(
                v1.is_variable_initialized(self._open),
                "The accumulator is not initialized. In this session, run the initializer that was made after "
                "minimize or apply_gradients: tf.compat.v1.global_variables_initializer().",
            )
            with tf.control_dependencies([initialized]):
                self._found = [v.read_value() for v in (self._open, self._updates, self._report)]
            found, self.updates = Scalars(*tf.unstack(self._found[0])), self._found[1]
            self.pending, self.pending_items = tf.cast(found.micro_batches, tf.int64), found.items
            self.last = _last(self._found[2])
        self.variables = [self._open, self._report, self._updates, self._run]

    def exclusively(self, work: Callable[[Scalars], tf.Tensor], name: str, after: Sequence[Any] = ()) -> tf.Operation:
        """An op that runs `work` on the open window while nobody else changes it.

        It takes the lock after the readings and `after`. `work` returns a tensor that comes after all that it does.
        tf.CriticalSection would wait for every input of every op of `work`, so for the whole backward pass; the sums
        had better take each gradient as it comes.
        """
        with tf.control_dependencies([*self._found, *after]):
            lock = tf.raw_ops.MutexLock(mutex=self._mutex)
        with tf.control_dependencies([lock]):
            first = require(
                tf.not_equal(self._run.read_value(), self._stamp),
                "One session.run may change a window once. Received: two of the op of minimize or apply_gradients, "
                "accumulate, apply, flush and zero. Run them one after the other; apply, flush and zero need no feed.",
            )
        with tf.control_dependencies([first]):
            mine = self._run.assign(self._stamp, read_value=False)
        with tf.control_dependencies([mine]):
            window = self._open.read_value()
        with tf.control_dependencies([window]):
            done = work(Scalars(*tf.unstack(window)))
        with tf.control_dependencies([done]):
            # Until here the lock's tensor lives, and with it the lock; after an error too it goes with the run.
            return tf.group(tf.raw_ops.ConsumeMutexLock(mutex_lock=lock), name=name)

    def set(self, scalars: Scalars) -> tf.Operation:
        """Writes the open window's scalars."""
        return self._open.assign(tf.stack(list(scalars)), read_value=False)

    def reset(self) -> tf.Operation:
        """Makes the window empty. What the sums hold is then nobody's: the next micro-batch assigns them."""
        return self._open.assign(tf.zeros_like(self._open), read_value=False)

    def report(self, window: Scalars, loss: tf.Tensor, norm: tf.Tensor | float, code: tf.Tensor | int) -> tf.Operation:
        """Writes `last`, and counts the update if it was applied."""
        code, norm = tf.cast(code, tf.float64), tf.cast(norm, tf.float64)
        index = self._updates.read_value()
        last = tf.stack([tf.cast(index, tf.float64), window.micro_batches, window.items, loss, norm, code])
        with tf.control_dependencies([index]):
            return tf.group(
                self._report.assign(last, read_value=False),
                self._updates.assign_add(tf.cast(tf.equal(code, APPLIED), tf.int64), read_value=False),
            )


def not_finite(loss: tf.Tensor, norm: tf.Tensor) -> tf.Tensor:
    """The reason to make no update from a window with inf or NaN in it."""
    numbers = [tf.strings.as_string(number, shortest=True) for number in (loss, norm)]
    return tf.strings.join(["the window is not finite: loss ", numbers[0], ", gradient norm ", numbers[1]])


def _last(report: tf.Tensor) -> Update:
    index, micro_batches, items, loss, norm, code = tf.unstack(report)
    index, micro_batches = tf.cast(index, tf.int64), tf.cast(micro_batches, tf.int64)
    held = tf.strings.join([tf.strings.as_string(micro_batches), " micro-batches of a partial window"])
    reasons = [
        tf.constant(""),
        not_finite(loss, norm),
        tf.strings.join(["carried: ", held, " wait for more"]),
        tf.strings.join(["dropped: ", held]),
    ]
    return Update(index, micro_batches, items, loss, norm, tf.gather(reasons, tf.cast(code, tf.int32)))


def _variable(dtype: tf.DType, shape: tuple[int, ...], name: str) -> Any:
    return v1.Variable(lambda: tf.zeros(shape, dtype), trainable=False, use_resource=True, name=name)
