"""The last window's update, for `MonitoredTrainingSession`."""

from typing import Any

import tensorflow as tf

from bigbatch.tf1.stream import Accumulator

v1 = tf.compat.v1


class FlushHook(v1.train.SessionRunHook):
    """Flushes an accumulator when a monitored session ends without an error.

    Pass it in `chief_only_hooks`, whose ends come before the checkpoint saver's, so that the last checkpoint holds
    the update::

        with tf.compat.v1.train.MonitoredTrainingSession(
            checkpoint_dir=directory, chief_only_hooks=[bb.FlushHook(acc)]
        ) as session:
            while not session.should_stop():
                session.run(train_op)

    Args:
        accumulator: one whose `minimize` or `apply_gradients` was called in the session's graph.
    """

    def __init__(self, accumulator: Accumulator):
        self._flush = accumulator.flush

    def end(self, session: Any) -> None:
        """Runs `flush`, which needs no feed."""
        session.run(self._flush)
