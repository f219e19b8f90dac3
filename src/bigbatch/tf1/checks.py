"""What is refused: while the graph is built, as Python's exceptions, and inside a run, as InvalidArgumentError."""

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf

from bigbatch import errors
from bigbatch.tf1.control_flow import only_if

v1 = tf.compat.v1
LossScaling = v1.train.experimental.MixedPrecisionLossScaleOptimizer


def require(holds: tf.Tensor, words: str | tf.Tensor) -> tf.Operation:
    """An op that raises InvalidArgumentError with `words` where `holds` is false."""
    # tf.debugging.Assert would put a conditional around it, which costs a run more than the words do.
    return tf.raw_ops.Assert(condition=holds, data=[words], summarize=1)


def check_optimizer(optimizer: Any, nonfinite: str, accumulator: type) -> Any:
    """Accepts an optimizer of `tf.compat.v1.train` that is no `accumulator` itself, and goes with `nonfinite`."""
    fix = "Pass the optimizer itself, such as tf.compat.v1.train.AdamOptimizer(1e-3)."
    if isinstance(optimizer, accumulator):
        raise TypeError(f"An Accumulator accumulates already. {errors.received('optimizer', optimizer)} {fix}")
    if not isinstance(optimizer, v1.train.Optimizer):
        if hasattr(optimizer, "apply_gradients"):
            fix += " An optimizer of Keras has no place in a session; bigbatch.tensorflow and bigbatch.keras take it."
        raise TypeError(
            f"optimizer must be a tf.compat.v1.train.Optimizer. {errors.received('optimizer', optimizer)} {fix}"
        )
    if isinstance(optimizer, LossScaling) and nonfinite == "apply":
        raise ValueError(
            "nonfinite='apply' has no effect with a loss-scaling optimizer, which makes no update from inf or NaN. "
            f"{errors.received('optimizer', optimizer)} Pass nonfinite='skip'."
        )
    return optimizer


def check_dtype(dtype: Any) -> tf.DType | None:
    """Accepts a floating dtype of TensorFlow, or None."""
    if dtype is not None and not (isinstance(dtype, tf.DType) and dtype.is_floating):
        raise TypeError(
            f"dtype must be a floating tf.DType or None. Received: dtype={dtype!r} ({type(dtype).__name__}). "
            "Pass tf.float32, or None for the variables' own."
        )
    return dtype


def check_place() -> None:
    """Accepts the place where ops would go, if a session can run them there by themselves."""
    if tf.executing_eagerly():
        raise ValueError(
            "There is no graph to build in. Call minimize and apply_gradients inside `with graph.as_default():`; "
            "without sessions, use bigbatch.tensorflow."
        )
    graph: Any = v1.get_default_graph()
    # Nothing public says that a graph is inside a conditional or a loop of the old kind; tests/tf1/test_private.py.
    if graph.building_function or graph._get_control_flow_context() is not None:
        raise ValueError(
            "minimize and apply_gradients must be called in the graph itself. Received: a call inside tf.cond, "
            "tf.while_loop or a function. Make the ops outside, and choose what to run with session.run; the loss may "
            "contain conditionals and loops."
        )
    if tf.distribute.has_strategy():
        raise ValueError(
            f"{type(tf.distribute.get_strategy()).__name__} does not run in a session with bigbatch. "
            "Use bigbatch.tensorflow, whose Accumulator takes distribution strategies."
        )


def check_step(global_step: Any) -> None:
    """Accepts a scalar variable of integers, or None."""
    if global_step is None:
        return
    if not isinstance(global_step, tf.Variable) or not global_step.dtype.is_integer or global_step.shape.rank != 0:
        raise TypeError(
            f"global_step must be a scalar integer variable or None. {errors.received('global_step', global_step)} "
            "Pass tf.compat.v1.train.get_or_create_global_step()."
        )


def no_second_variable(next_creator: Any, **options: Any) -> Any:
    """A variable creator for the second time that an optimizer's step is built; Saver and get_variable see no call."""
    raise ValueError(
        f"The optimizer makes a new variable each time apply_gradients is called. Received: {options.get('name')!r}. "
        "Make it once, in _create_slots or with tf.compat.v1.get_variable: apply_gradients is built twice, for "
        "the micro-batch's op and for acc.apply, and both must move the same variables."
    )


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
    if not every.dtype.is_integer or not every.shape.is_compatible_with(()):
        errors.check_every(every)  # says what every must be
    every = tf.ensure_shape(every, ())
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
    pairs = list(grads_and_vars)
    if all(grad is None for grad, _ in pairs):
        raise ValueError(f"No gradients provided for any variable: {[variable.name for _, variable in pairs]}.")
    return [(None if grad is None else _check_gradient(grad, variable), variable) for grad, variable in pairs]


def _check_gradient(grad: Any, variable: Any) -> tf.Tensor | tf.IndexedSlices:
    """Accepts a real gradient of the variable's shape, which the graph checks where it is not known."""
    if not isinstance(variable, tf.Variable) or not variable.dtype.is_floating:
        raise TypeError(f"Gradients go with variables of a floating dtype. {errors.received('variable', variable)}")
    shape = variable.shape
    if not shape.is_fully_defined():
        raise ValueError(f"Variable {variable.name} has no static shape. Received: shape={shape}.")
    sparse = isinstance(grad, tf.IndexedSlices)
    values = grad.values if sparse else tf.convert_to_tensor(grad)
    expected = tf.TensorShape([None, *shape[1:]]) if sparse else shape
    if not values.dtype.is_floating or not values.shape.is_compatible_with(expected):
        raise ValueError(
            f"A gradient must be real and of its variable's shape. {errors.received('gradient', values)} "
            f"Variable {variable.name} has shape {tuple(shape)}."
        )
    if not (values.shape[1:] if sparse else values.shape).is_fully_defined():
        values = tf.ensure_shape(values, expected)
    return tf.IndexedSlices(values, grad.indices, grad.dense_shape) if sparse else values
