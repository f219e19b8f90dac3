"""The order in which TensorFlow runs a graph's operations, and what it concludes from a variable's shape."""

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf


def after(*operations: Any) -> Any:
    """A context whose operations run after these, nested in any way. None stands for one that has run eagerly."""
    return tf.control_dependencies([operation for operation in tf.nest.flatten(operations) if operation is not None])


def done(*operations: Any) -> tf.Tensor:
    """A tensor that is there once these have run. A conditional can return that, and no operation."""
    with after(*operations):
        return tf.identity(tf.constant(True))


def in_turn(work: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
    """`map`, one result after the other: TensorFlow would compute all products before it adds the first."""
    results: list[Any] = []
    for each in zip(*arguments, strict=True):
        with after(tf.nest.flatten(results[-1:], expand_composites=True)):
            results.append(work(*each))
    return results


def loop(body: Callable[[tf.Tensor, Any], tuple[Any, Any]], start: Any, stop: Any, state: Any) -> Any:
    """The state after `body`, which takes an index and the state and returns the next ones, until `stop`.

    A tensor of no rows may become one of any number of rows.
    """
    return tf.while_loop(
        lambda i, _: i < stop,
        body,
        (start, state),
        shape_invariants=(tf.TensorShape(()), tf.nest.map_structure(_invariant, state)),
        parallel_iterations=1,  # more would hold the activations of more than one micro-batch
    )[1]


def _invariant(tensor: Any) -> Any:
    if isinstance(tensor, tf.TensorArray):
        return None
    return tf.TensorShape([None, *tensor.shape[1:]]) if tensor.shape.rank and tensor.shape[0] == 0 else tensor.shape


def of_any_shape(x: Any) -> Any:
    """The same tensor with a shape that no graph knows, to assign to a variable whose number of rows changes.

    Grappler assumes that a variable and what is assigned to it have one shape. Where it knows one it folds `tf.shape`
    of the variable to that. Where it knows two that differ it discards what it knew of the whole graph, and oneDNN's
    rewriting of a convolution then aborts the process. A placeholder's default is the one value that it infers no shape
    from.
    """
    if tf.executing_eagerly():
        return x
    return tf.reshape(x, tf.compat.v1.placeholder_with_default(tf.shape(x), [x.shape.rank]))
