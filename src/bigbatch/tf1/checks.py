"""What is refused: while the graph is built, as Python's exceptions, and inside a run, as InvalidArgumentError."""

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from bigbatch import errors
from bigbatch.tf1.order import only_if

v1 = tf.compat.v1


def require(holds: tf.Tensor, words: str | tf.Tensor) -> tf.Operation:
    """An op that raises InvalidArgumentError with `words` where `holds` is false."""
    # tf.debugging.Assert would put a conditional around it, which costs a run more than the words do.
    return tf.raw_ops.Assert(condition=holds, data=[words], summarize=1)


def check_optimizer(optimizer: Any) -> Any:
    """Accepts an optimizer of `tf.compat.v1.train`."""
    if not isinstance(optimizer, v1.train.Optimizer):
        raise TypeError(
            f"optimizer must be a tf.compat.v1.train.Optimizer. {errors.received('optimizer', optimizer)} "
            "Pass the optimizer itself, such as tf.compat.v1.train.AdamOptimizer(1e-3)."
        )
    return optimizer


def check_items(items: Any) -> Any:
    """Accepts a number above zero, or a tensor of one number, which `positive` reads in the graph."""
    if not tf.is_tensor(items):
        return errors.check_items(items)
    if not (items.dtype.is_integer or items.dtype.is_floating) or items.shape.num_elements() not in (None, 1):
        errors.check_items(items)  # says what a number is
    return items


def positive(items: Any) -> tf.Tensor:
    """Items that `check_items` accepted, as a float64 scalar.

    Running it raises InvalidArgumentError, in the words of `errors.check_items`, where a tensor holds no number above
    zero.
    """
    if not tf.is_tensor(items):
        return tf.constant(items, tf.float64)
    items = tf.reshape(items, ())
    wide = tf.cast(items, tf.float64)
    not_finite, not_positive = (_around(errors.check_items, refused) for refused in (float("nan"), 0))
    holds, finite = wide > 0, None
    if items.dtype.is_floating:
        finite = tf.math.is_finite(wide)
        holds = tf.logical_and(holds, finite)

    def refuse() -> tf.Operation:
        wrong = not_positive[0] if finite is None else tf.where(finite, not_positive[0], not_finite[0])
        return require(tf.constant(False), tf.strings.join([wrong, *_shown(items), not_positive[1]]))

    # Writing the number down takes longer than the condition that avoids it.
    with tf.control_dependencies([only_if(tf.logical_not(holds), refuse)]):
        return tf.identity(wide)


def check_plan(every: Any) -> Any:
    """Accepts what a callable `every` returned: a number of micro-batches, or a tensor of one that the graph checks."""
    if not tf.is_tensor(every):
        return errors.check_every(every)
    before, after = _around(errors.check_every, 0)
    with tf.control_dependencies([require(every >= 1, tf.strings.join([before, *_shown(every), after]))]):
        return tf.identity(every)


def _shown(number: tf.Tensor) -> list[Any]:
    """The value and its type, as `errors.received` shows them."""
    return [tf.strings.as_string(number, shortest=number.dtype.is_floating), f" ({number.dtype.name})"]


def _around(check: Callable[[Any], Any], refused: float) -> list[str]:
    """The two halves of what a check says of a value it refuses, before and after the value and its type."""
    try:
        check(refused)
    except ValueError as error:
        return str(error).split(f"{refused} ({type(refused).__name__})")
    raise ValueError(f"{check.__name__} accepts {refused}")


def check_loss(loss: Any) -> tf.Tensor:
    """Accepts a real scalar tensor."""
    if not tf.is_tensor(loss) or not loss.dtype.is_floating or not loss.shape.is_compatible_with(()):
        raise errors.loss_not_scalar(loss)
    return tf.convert_to_tensor(loss)


def check_gradients(grads_and_vars: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Accepts pairs as `compute_gradients` returns them, of which at least one has a gradient."""
    pairs = [
        (grad if grad is None or isinstance(grad, tf.IndexedSlices) else tf.convert_to_tensor(grad), variable)
        for grad, variable in grads_and_vars
    ]
    if all(grad is None for grad, _ in pairs):
        raise ValueError(f"No gradients provided for any variable: {[variable.name for _, variable in pairs]}.")
    for grad, variable in pairs:
        if grad is None:
            continue
        if not variable.shape.is_fully_defined():
            raise ValueError(f"Variable {variable.name} has no static shape. Received: shape={variable.shape}.")
    return pairs
