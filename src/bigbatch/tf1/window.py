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

    run: Any  # the stamp of the session.run that changed it last
    micro_batches: Any
    items: Any
    unit: Any  # the items planned for the window; the sums are kept divided by it
    loss: Any  # Σ nᵢ·lossᵢ / unit


class Window:
    """The variables of a window, saved and initialized with the model's, on the CPU.

    Attributes:
        pending, pending_items, updates, last: readings, as a run finds them.
        variables: what the readings read.
    """

    def __init__(self):
        with tf.device("/cpu:0"):
            self._open = _variable(tf.float64, len(Scalars._fields), "window")
            self._report = _variable(tf.float64, 1 + len(Update._fields), "last")
            self.variables = [self._open, self._report]
            self._stamp = tf.timestamp()  # once a run, for all that is fetched in it
            name = tf.raw_ops.NoOp(name="lock").name  # unique in the graph, and the same in the next process
            self._mutex = tf.raw_ops.MutexV2(shared_name=name)
            initialized = require(
                v1.is_variable_initialized(self._open),
                "The accumulator is not initialized. In this session, run the initializer that was made after "
                "minimize or apply_gradients: tf.compat.v1.global_variables_initializer().",
            )
            with tf.control_dependencies([initialized]):
                self._found = [tf.raw_ops.ReadVariableOp(resource=v.handle, dtype=v.dtype) for v in self.variables]
            found = Scalars(*tf.unstack(self._found[0]))
            self.pending, self.pending_items = tf.cast(found.micro_batches, tf.int64), found.items
            self.updates, self.last = _reported(self._found[1])

    def exclusively(self, work: Callable[[Scalars], tf.Tensor], name: str, after: Sequence[Any] = ()) -> tf.Operation:
        """An op that runs `work` on the open window while nobody else changes it.

        `work` takes the window's scalars and returns what they are to be, as a tensor (`packed`, `empty`) that comes
        after all that it does. In between the window is empty: if some of `work` fails, the next one starts anew.

        The lock is taken after the readings and `after`. tf.CriticalSection would wait for every input of every op of
        `work`, so for the whole backward pass; the sums had better take each gradient as it comes.
        """
        with tf.control_dependencies([*self._found, *after]):
            lock = tf.raw_ops.MutexLock(mutex=self._mutex)
        with tf.control_dependencies([lock]):
            window = Scalars(*tf.unstack(self._open.read_value()))
            once = require(
                tf.not_equal(window.run, self._stamp),
                "One session.run may change a window once. Received: two of the op of minimize or apply_gradients, "
                "accumulate, apply, flush and zero. Run them one after the other; apply, flush and zero need no feed.",
            )
        with tf.control_dependencies([once]):
            taken = self._open.assign(self.empty(), read_value=False)
        with tf.control_dependencies([taken]):
            done = self._open.assign(work(window._replace(run=self._stamp)), read_value=False)
        with tf.control_dependencies([done]):
            # Until here the lock's tensor lives, and with it the lock; after an error too it goes with the run.
            return tf.group(tf.raw_ops.ConsumeMutexLock(mutex_lock=lock), name=name)

    def empty(self) -> tf.Tensor:
        """No window. What the sums hold is then nobody's: the next micro-batch assigns them."""
        return packed(Scalars(self._stamp, *[tf.constant(0, tf.float64)] * 4))

    def report(self, window: Scalars, loss: tf.Tensor, norm: tf.Tensor | float, code: tf.Tensor | int) -> tf.Operation:
        """Writes `last`, and counts the update if it was applied."""
        code, norm = tf.cast(code, tf.float64), tf.cast(norm, tf.float64)
        index = self._report.read_value()[0]
        updates = index + tf.cast(tf.equal(code, APPLIED), tf.float64)
        last = [updates, index, window.micro_batches, window.items, loss, norm, code]
        return self._report.assign(tf.stack(last), read_value=False)


def packed(scalars: Scalars) -> tf.Tensor:
    """As the variable holds them."""
    return tf.stack(list(scalars))


def not_finite(loss: tf.Tensor, norm: tf.Tensor) -> tf.Tensor:
    """The reason to make no update from a window with inf or NaN in it."""

    def shown(number: tf.Tensor) -> tf.Tensor:
        return tf.where(tf.math.is_nan(number), "nan", tf.strings.as_string(number, shortest=True))  # not "-nan"

    return tf.strings.join(["the window is not finite: loss ", shown(loss), ", gradient norm ", shown(norm)])


def _reported(report: tf.Tensor) -> tuple[tf.Tensor, Update]:
    """The number of updates, and the last window's."""
    updates, index, micro_batches, items, loss, norm, code = tf.unstack(report)
    updates, index, micro_batches = (tf.cast(count, tf.int64) for count in (updates, index, micro_batches))
    held = tf.strings.join([tf.strings.as_string(micro_batches), " micro-batches of a partial window"])
    reasons = [
        tf.constant(""),
        not_finite(loss, norm),
        tf.strings.join(["carried: ", held, " wait for more"]),
        tf.strings.join(["dropped: ", held]),
    ]
    return updates, Update(index, micro_batches, items, loss, norm, tf.gather(reasons, tf.cast(code, tf.int32)))


def _variable(dtype: tf.DType, size: int, name: str) -> Any:
    return v1.Variable(lambda: tf.zeros([size], dtype), trainable=False, use_resource=True, name=name)
