"""The open window's scalars, what the last one came to, and the lock that all who change them take.

What a graph can and cannot order shapes this file. Ops that are fetched together run in no order but that of their
inputs, and an op that needs no feed cannot have one that does for an input. So readings are taken before anything
changes, and those who change a window have turns (`order`): the micro-batch, apply, flush, zero. The lock is for
sessions that several threads run.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch import skipped as reasons_for
from bigbatch.tf1.checks import require
from bigbatch.tf1.control_flow import Turn, only_if

v1 = tf.compat.v1

APPLIED, NOT_FINITE, CARRIED, DROPPED = range(4)


class _Update(NamedTuple):
    index: Any
    micro_batches: Any
    items: Any
    loss: Any
    grad_norm: Any
    skipped: Any


class Update(_Update):
    """What the last window came to, as tensors: `session.run(acc.last)` gives an `Update` of numbers.

    Attributes:
        index: the update's index, from 0, int64; a skipped window leaves it for the next.
        micro_batches: how many micro-batches the window held, int64.
        items: the examples or tokens that they counted for, float64.
        loss: the window's mean loss over items, float64; NaN where `apply_gradients` was given none.
        grad_norm: the 2-norm of the window's gradient, before clipping, float64; NaN where none was taken.
        skipped: why no update was made, a string; None where it was made. The tensor alone, `acc.last.skipped`, is
            fetched as the bytes that a session makes of any string, and empty where an update was made.
    """

    __slots__ = ()

    def __new__(cls, index: Any, micro_batches: Any, items: Any, loss: Any, grad_norm: Any, skipped: Any) -> "Update":
        """Takes tensors or, from `session.run`, what it fetched of them, of which the text is bytes."""
        if isinstance(skipped, bytes):
            skipped = skipped.decode() or None
        return super().__new__(cls, index, micro_batches, items, loss, grad_norm, skipped)


class Scalars(NamedTuple):
    """An open window's, all float64, which counts exactly to 2⁵³: one variable, so one read and one write."""

    micro_batches: Any
    items: Any
    unit: Any  # the items planned for the window; the sums are kept divided by it. 0 for reduction="sum"
    loss: Any  # Σ nᵢ·lossᵢ / unit
    mark: Any  # the fingerprint of the trained variables at the window's first micro-batch


class Lock(NamedTuple):
    """The window is changed by one at a time. `taken` has to live until all is done, and `turn` to be run."""

    taken: tf.Tensor
    turn: tf.Operation


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
        self._device = self._open.device  # on a parameter server the lock is there too, one for all workers
        with tf.device(self._device):
            name = tf.raw_ops.NoOp(name="lock").name  # unique in the graph, and the same in the next process
            self._mutex = tf.raw_ops.MutexV2(shared_name=name)
            initialized = v1.is_variable_initialized(self._open)
            said = require(
                initialized,
                "The accumulator is not initialized. In this session, run the initializer that was made after "
                "minimize or apply_gradients: tf.compat.v1.global_variables_initializer().",
            )
            with tf.control_dependencies([said]):
                self._found = [_read(v) for v in self.variables]
            found = Scalars(*tf.unstack(self._found[0]))
            self.pending, self.pending_items = tf.cast(found.micro_batches, tf.int64), found.items
            self.updates, self.last = _reported(self._found[1])
            self._turns = [Turn(f"{name}/{turn}", initialized) for turn in range(4)]

    def lock(self, after: Sequence[Any], turn: int = 0) -> Lock:
        """The lock, taken after the readings, `after` and the turns before this one; 0 is the micro-batch's.

        tf.CriticalSection would wait for every input of every op that works under it, so for the whole backward pass;
        the sums had better take each gradient as it comes.
        """
        with tf.device(self._device):
            before = [earlier.after() for earlier in self._turns[:turn]]
            with tf.control_dependencies([*self._found, *after, *before]):
                taken = tf.raw_ops.MutexLock(mutex=self._mutex)
            with tf.control_dependencies([taken]):  # from here on, who comes after waits for the lock
                return Lock(taken, self._turns[turn].come())

    def read(self, lock: Lock) -> Scalars:
        """The open window, under the lock."""
        with tf.control_dependencies([lock.taken]):
            return Scalars(*tf.unstack(_read(self._open)))

    def count(self, lock: Lock) -> tf.Tensor:
        """How many updates were made, under the lock."""
        with tf.control_dependencies([lock.taken]):
            return tf.cast(_read(self._report)[0], tf.int64)

    def write(self, scalars: Scalars, after: Sequence[Any]) -> tf.Operation:
        """Leaves the window so."""
        packed = tf.stack(list(scalars))
        with tf.control_dependencies(after):
            return self._open.assign(packed, read_value=False)

    def require_none(self, found: Scalars) -> tf.Operation:
        """An op that raises where `found`, of which no window is open, holds something, or the count of updates none.

        An open window has at least one micro-batch; without one all is zero, except in a damaged checkpoint.
        """
        updates = _read(self._report)[0]
        sound = tf.logical_and(tf.math.is_finite(updates), updates >= 0)
        return require(
            tf.logical_and(tf.reduce_all(tf.equal(tf.stack(list(found)), 0)), sound),
            damaged({**found._asdict(), "updates": updates}),
        )

    def empty(self) -> tf.Operation:
        """Leaves no window. What the sums hold is then nobody's: the next micro-batch assigns them."""
        return self._open.assign(tf.zeros([len(Scalars._fields)], tf.float64), read_value=False)

    def release(self, lock: Lock, after: Sequence[tf.Operation], name: str) -> tf.Operation:
        """An op that comes after `after` and gives the lock back, once all of these that the run holds have come."""
        with tf.control_dependencies(after), tf.device(self._device):
            # Until here the lock's tensor lives, and with it the lock; after an error too it goes with the run.
            return tf.group(tf.raw_ops.ConsumeMutexLock(mutex_lock=lock.taken), lock.turn, name=name)

    def exclusively(self, work: Callable[[Scalars], tf.Operation], name: str, turn: int) -> tf.Operation:
        """An op that does `work` on the open window, if there is one."""
        lock = self.lock([], turn)
        window = self.read(lock)
        # Not `> 0`: what a damaged checkpoint left, such as NaN, is refused by `apply` and forgotten by `zero`.
        found = tf.not_equal(window.micro_batches, 0)
        return self.release(lock, [only_if(found, lambda: work(window))], name)

    def report(self, window: Scalars, loss: tf.Tensor, norm: tf.Tensor | float, code: tf.Tensor | int) -> tf.Operation:
        """Writes `last`, and counts the update if it was applied."""
        code, norm = tf.cast(code, tf.float64), tf.cast(norm, tf.float64)
        index = _read(self._report)[0]
        updates = index + tf.cast(tf.equal(code, APPLIED), tf.float64)
        last = [updates, index, window.micro_batches, window.items, loss, norm, code]
        return self._report.assign(tf.stack(last), read_value=False)


def require_usable(window: Scalars, reduction: str) -> tf.Operation:
    """An op that raises where an open window's counts cannot have come from an accumulator of this `reduction`."""
    counts = tf.stack([window.micro_batches, window.items])
    holds = tf.logical_and(tf.reduce_all(tf.math.is_finite(counts)), tf.reduce_all(counts > 0))
    holds = tf.logical_and(holds, tf.equal(tf.floor(window.micro_batches), window.micro_batches))
    planned = tf.logical_and(tf.math.is_finite(window.unit), window.unit > 0)
    same_reduction = tf.equal(window.unit, 0) if reduction == "sum" else planned
    return require(tf.logical_and(holds, same_reduction), damaged(window._asdict()))


def damaged(counts: dict[str, Any]) -> tf.Tensor:
    """Says that counts cannot be those of a window."""
    shown = [part for name in ("micro_batches", "items", "unit", "updates") if name in counts
             for part in (f" {name}=", tf.strings.as_string(counts[name], shortest=True))]  # fmt: skip
    return tf.strings.join([
        "The accumulator's variables do not hold a window of this Accumulator. Received:",
        *shown,
        ". They come from a damaged checkpoint, or from one with another `reduction`. The window was dropped; the "
        "model's variables and the optimizer are as they were. Restore another checkpoint, or leave acc.variables() "
        "out and run tf.compat.v1.variables_initializer(acc.variables()).",
    ])  # fmt: skip


def not_finite(loss: tf.Tensor, norm: tf.Tensor) -> tf.Tensor:
    """The reason to make no update from a window with inf or NaN in it."""

    def shown(number: tf.Tensor) -> tf.Tensor:
        return tf.where(tf.math.is_nan(number), "nan", tf.strings.as_string(number, shortest=True))  # not "-nan"

    return _filled(reasons_for.not_finite("{loss}", "{norm}"), loss=shown(loss), norm=shown(norm))


def _reported(report: tf.Tensor) -> tuple[tf.Tensor, Update]:
    """The number of updates, and the last window's."""
    updates, index, micro_batches, items, loss, norm, code = tf.unstack(report)
    updates, index, micro_batches = (tf.cast(count, tf.int64) for count in (updates, index, micro_batches))
    noun = tf.where(tf.equal(micro_batches, 1), " micro-batch", " micro-batches")
    held = tf.strings.join([tf.strings.as_string(micro_batches), noun])
    reasons = [
        tf.constant(""),
        not_finite(loss, norm),
        _filled(reasons_for.CARRIED, held=held),
        _filled(reasons_for.DROPPED, held=held),
    ]
    return updates, Update(index, micro_batches, items, loss, norm, tf.gather(reasons, tf.cast(code, tf.int32)))


def _filled(text: str, **values: tf.Tensor) -> tf.Tensor:
    """A text with tensors of text in its `{names}`."""
    parts = re.split(r"\{(\w+)\}", text)
    return tf.strings.join([values[part] if k % 2 else part for k, part in enumerate(parts)])


def _variable(dtype: tf.DType, size: int, name: str) -> Any:
    return v1.Variable(lambda: tf.zeros([size], dtype), trainable=False, use_resource=True, name=name)


def _read(variable: Any) -> tf.Tensor:
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
