"""Detects what others change in an open window, from notes of the optimizer's steps and the variables' bits."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_writes import written
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.tensorflow.checks import name_of

MOVED = (
    "inside an open window, whose gradients then belong to different values: another apply_gradients, a second "
    "Accumulator, an assign or a restored checkpoint did that. No update was made, the variables are as they are now, "
    "and the window is dropped. Move it between two windows, after an update or reset()."
)

STEPPED = f"The optimizer made a step of its own {MOVED}"


class Guard(tf.Module):
    """Notes of the values with which the open window began.

    The bits of each variable are read in one pass when the window opens, and in one when it closes. Not those of
    variables on a GPU, with sparse gradients, on replicas or under XLA: there only the optimizer's own count of steps
    shows that somebody else made one.
    """

    def __init__(self, **options: Any):
        super().__init__()
        self._steps = tf.Variable(tf.constant(-1, tf.int64), **options)  # unknown, as after a checkpoint without
        # Not between workers, who could not broadcast its first value: a collective takes no uint8.
        if not isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
            self._bits = tf.Variable(tf.zeros([0, 8], tf.uint8), shape=[None, 8], **options)

    def open(self, optimizer: Any, variables: Sequence[Any], dense: Sequence[bool]) -> list[Any]:
        """Notes what is there now; `dense` says of which variables the bits count. Returns the operations that do."""
        noted = [self._steps.assign(_steps(optimizer), read_value=False)]
        if not tf.distribute.has_strategy():
            now = tf.zeros_like(self._bits) if under_xla() else bits_of(variables, dense)
            noted.append(self._bits.assign(now, read_value=False))
        return noted

    def moved(
        self, optimizer: Any, variables: Sequence[Any], dense: Sequence[bool]
    ) -> tuple[tf.Tensor, Callable[[], tf.Tensor]]:
        """Whether somebody else made a step or changed a variable since then, and a text that says which."""
        stepped = (self._steps >= 0) & tf.not_equal(_steps(optimizer), self._steps)
        if not variables or under_xla() or tf.distribute.has_strategy():
            return stepped, lambda: tf.constant(STEPPED)
        # A variable that joined later in the window has no note.
        noted = tf.concat([self._bits, tf.zeros([len(variables), 8], tf.uint8)], 0)[: len(variables)]
        changed = _changed(noted, bits_of(variables, dense))
        any_changed = tf.reduce_any(changed)

        def text() -> tf.Tensor:
            names = tf.constant([f"{name_of(v)} changed {MOVED}" for v in variables])
            return tf.where(any_changed, tf.gather(names, tf.argmax(tf.cast(changed, tf.int32))), STEPPED)

        return stepped | any_changed, text


def bits_of(variables: Sequence[Any], dense: Sequence[bool] | None = None) -> tf.Tensor:
    """Eight bytes for each variable, uint8 of shape (variables, 8); zeros for one that is not looked at."""
    rows = [tf.zeros([0, 8], tf.uint8)]
    for variable, looked_at in zip(variables, dense or [True] * len(variables), strict=True):
        if looked_at and "GPU" not in str(_own(variable).device):
            rows.append(tf.fingerprint(tf.reshape(tf.convert_to_tensor(variable), [1, -1])))
        else:
            rows.append(tf.zeros([1, 8], tf.uint8))
    return tf.concat(rows, 0)


def check_unmoved(variables: Sequence[Any], noted: tf.Tensor) -> None:
    """For the split API outside a tf.function, once the micro-batches are through."""
    changed = [name_of(v) for v, c in zip(variables, _changed(noted, bits_of(variables)).numpy(), strict=True) if c]
    if changed:
        raise _written(changed)


def check_unwritten(graph: Any, variables: Sequence[Any]) -> None:
    """For the split API inside a tf.function: a micro-batch's graph must not write to these variables."""
    handles = {id(handle) for handle in written(graph)}
    changed = [name_of(v) for v in variables if id(getattr(_own(v), "handle", None)) in handles]
    if changed:
        raise _written(changed)


def _written(names: list[str]) -> Exception:
    return RuntimeError(
        f"{', '.join(names)} changed while its gradient was taken: loss_fn calls an optimizer's apply_gradients, "
        "an Accumulator or an assign. The micro-batches' gradients belong to different values, and none is returned. "
        "Move that out of loss_fn, after value_and_grad."
    )


def _own(variable: Any) -> Any:
    """TensorFlow's variable inside of a Keras one."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def _changed(noted: tf.Tensor, now: tf.Tensor) -> tf.Tensor:
    known = tf.reduce_any(tf.not_equal(noted, 0), 1) & tf.reduce_any(tf.not_equal(now, 0), 1)
    return known & tf.reduce_any(tf.not_equal(noted, now), 1)


def _steps(optimizer: Any) -> tf.Tensor:
    """The optimizer's own count, or 0 where it keeps none."""
    return tf.cast(tf.convert_to_tensor(getattr(optimizer, "iterations", 0)), tf.int64)
