"""What runs, and what waits for what, among the ops that a session.run fetches: two things that tf.cond and edges miss.

Both are made of the ops that TensorFlow's executor itself turns conditionals and loops into: an op of which one input
is dead does not run and passes the deadness on, a Merge passes on the input that is alive, and a loop's iterations run
in a frame.
"""

from collections.abc import Callable

import tensorflow as tf


def only_if(holds: tf.Tensor, work: Callable[[], tf.Operation]) -> tf.Operation:
    """An op that comes after what `work` builds, which runs where `holds` is true, or at once where it is not.

    tf.cond would switch every tensor that `work` takes from outside, and an update takes some forty: on the runs that
    make none, that is what they would cost. Here one Switch kills them all.
    """
    no, yes = tf.raw_ops.Switch(data=holds, pred=holds)
    with tf.control_dependencies([tf.identity(yes)]):  # an edge from the Switch would be alive whichever way it goes
        done = work()
        with tf.control_dependencies([done]):
            yes = tf.identity(yes)
    return tf.raw_ops.Merge(inputs=[yes, no]).output.op


class Turn:
    """A place in the order of a run: some ops have this turn, and others come after those of them that are fetched.

    An edge from `accumulate` to `apply` would order the two, and have each `apply` run a micro-batch. So they meet in
    a frame of the executor, which is over when all the Enter ops that the run holds of it have come; only then is a
    dead Exit told to those behind it.
    """

    def __init__(self, name: str, never: tf.Tensor):
        self._name, self._never = name, never  # `never` is false, and not a constant, which would be folded away

    def after(self) -> tf.Operation:
        """An op that comes after those that have this turn and are in the run, and at once if none is."""
        dead = tf.raw_ops.Switch(data=(here := self._enter()), pred=here).output_true
        with tf.control_dependencies([tf.raw_ops.Exit(data=dead)]):
            return tf.raw_ops.ControlTrigger()  # which deadness does not stop

    def done(self) -> tf.Operation:
        """An op by which what this op has to wait for has this turn."""
        return tf.raw_ops.Exit(data=self._enter()).op

    def _enter(self) -> tf.Tensor:
        return tf.raw_ops.Enter(data=self._never, frame_name=self._name)
