"""The wrapped optimizer's own step, as ops that run where a window closes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from bigbatch.tf1 import checks
from bigbatch.tf1.control_flow import only_if

v1 = tf.compat.v1


class Step:
    """Builds `optimizer.apply_gradients` once for the micro-batch's op and once for `apply`.

    Both are built in the scopes in which this object was made, so that the optimizer's variables have the names that
    it gives them without bigbatch, and its checkpoints are interchangeable.
    """

    def __init__(self, optimizer: Any, global_step: Any):
        self._optimizer, self._global_step = optimizer, global_step
        self._scope, self._again = v1.get_default_graph().get_name_scope(), False

    def only_if(self, finite: tf.Tensor, pairs: list[tuple[Any, Any]]) -> tf.Operation:
        """An op that makes the step where `finite` is true."""
        scaled = isinstance(self._optimizer, checks.LossScaling)
        return only_if(finite, lambda: self._made(pairs), otherwise=(lambda: self._lowered(pairs)) if scaled else None)

    def _made(self, pairs: list[tuple[Any, Any]]) -> tf.Operation:
        with contextlib.ExitStack() as stack:
            stack.enter_context(v1.get_default_graph().name_scope(self._scope and f"{self._scope}/"))
            if self._again:
                # Optimizers that call get_variable, as BERT's does, find the second time what they made the first.
                scope = v1.variable_scope(v1.get_variable_scope(), reuse=v1.AUTO_REUSE, auxiliary_name_scope=False)
                stack.enter_context(scope)
                stack.enter_context(tf.variable_creator_scope(checks.no_second_variable))
            self._again = True
            return self._optimizer.apply_gradients(pairs, self._global_step)

    def _lowered(self, pairs: list[tuple[Any, Any]]) -> tf.Operation:
        """A loss scale has to see inf and NaN: it lowers itself."""
        # Its apply_gradients would apply them where the scale is a fixed one; nothing public returns the scale.
        update, _ = self._optimizer._loss_scale.update([grad for grad, _ in pairs])
        return tf.group(update)


@contextlib.contextmanager
def one_train_op() -> Iterator[list[Any]]:
    """The graph's train ops, as they were before: the wrapped optimizer's own stand in conditionals."""
    collection = v1.get_collection_ref(v1.GraphKeys.TRAIN_OP)
    before = list(collection)
    yield before
    collection[:] = before
