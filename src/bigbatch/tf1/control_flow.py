"""What runs, and what waits for what, among the ops that a session.run fetches: two things that tf.cond and edges miss.

Both are made of the ops that TensorFlow's executor itself turns conditionals and loops into: an op of which one input
is dead does not run and passes the deadness on, a Merge passes on the input that is alive, and a loop's iterations run
in a frame.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def only_if(
    holds: tf.Tensor,
    work: Callable[[], tf.Operation],
    after: Sequence[Any] = (),
    otherwise: Callable[[], tf.Operation] | None = None,
) -> tf.Operation:
    """An op that comes after what `work` builds, which runs `after` those where `holds` is true, or else at once.

    `otherwise` builds what runs where it is false. tf.cond would switch every tensor that `work` takes from outside,
    and an update takes some forty: on the runs that make none, that is what they would cost. Here one Switch kills
    them all.
    """
    no, yes = tf.raw_ops.Switch(data=holds, pred=holds)
    with tf.control_dependencies(after):
        go = tf.identity(yes)  # an edge from the Switch itself would be alive whichever way it goes
    yes = _after(go, work)
    if otherwise is not None:
        no = _after(tf.identity(no), otherwise)
    return tf.raw_ops.Merge(inputs=[yes, no]).output.op


def _after(go: tf.Tensor, work: Callable[[], tf.Operation]) -> tf.Tensor:
    """`go`, once what `work` builds after it has run."""
    with tf.control_dependencies([go]):
        done = work()
        with tf.control_dependencies([done]):
            return tf.identity(go)


class Turn:
    """A place in the order of a run: some ops come in this turn, and others after those of them that are fetched.

    An edge from `accumulate` to `apply` would order the two, and have each `apply` run a micro-batch. So they meet in
    a frame of the executor, which is over when all the Enter ops that the run holds of it have come; only then is a
    dead Exit told to those behind it.
    """

    def __init__(self, name: str, true: tf.Tensor):
        self._name, self._true = name, true  # not a constant, which would be folded away and all that hangs on it

    def come(self) -> tf.Operation:
        """An op by which what it waits for comes in this turn."""
        return tf.raw_ops.Exit(data=self._enter()).op

    def after(self) -> tf.Operation:
        """An op that comes after all that come in this turn and are in the run, and at once if none is."""
        here = self._enter()
        dead = tf.raw_ops.Switch(data=here, pred=here).output_false
        with tf.control_dependencies([tf.raw_ops.Exit(data=dead)]):
            return tf.raw_ops.ControlTrigger()  # which deadness does not stop

    def _enter(self) -> tf.Tensor:
        return tf.raw_ops.Enter(data=self._true, frame_name=self._name)
