"""Checks of arguments, losses and items: when the API is called, and again in the graph for what only the run tells."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_xla import under_xla

# Counts of items, and losses weighted by them: exact for integers up to 2^53, where a sum in bf16 would stop at 256.
COUNT = tf.float64


def check_dtype(dtype: Any) -> tf.DType | None:
    """Accepts a floating dtype to accumulate in, or None."""
    if dtype is not None and not (isinstance(dtype, tf.DType) and dtype.is_floating):
        kind = ValueError if isinstance(dtype, tf.DType) else TypeError
        raise kind(
            f"dtype must be a floating tf.DType or None. {errors.received('dtype', dtype)} "
            "Pass tf.float32 or tf.float64, or None to accumulate in the variables' own."
        )
    return dtype


def widened(dtype: Any, narrowest: Any) -> tf.DType:
    """The dtype to accumulate in: a variable's own, or `narrowest` where that is wider."""
    dtype = tf.as_dtype(dtype)
    return dtype if narrowest is None or dtype.size >= tf.as_dtype(narrowest).size else tf.as_dtype(narrowest)


def check_optimizer(optimizer: Any, nonfinite: str) -> None:
    """Refuses what cannot make the update of a window, or would make another than it reports."""
    if not callable(getattr(optimizer, "apply_gradients", None)):
        raise TypeError(
            f"optimizer must have an apply_gradients method. {errors.received('optimizer', optimizer)} "
            "Pass the optimizer itself, such as tf.keras.optimizers.AdamW(1e-3)."
        )
    check_steps(optimizer)
    if nonfinite == "apply" and scales_losses(optimizer):
        raise ValueError(
            "nonfinite='apply' has no effect with a LossScaleOptimizer, which makes no update from inf or NaN. "
            f"{errors.received('optimizer', optimizer)} Pass nonfinite='skip'."
        )


def check_steps(optimizer: Any) -> None:
    """Refuses a Keras optimizer that accumulates by itself."""
    errors.check_accumulates_once(optimizer)


def check_planned(every: Callable[[Any], Any]) -> Any:
    """The graph of a function of the update's index, whose answer must be one integer.

    Its shape and dtype are known before its value; a wrong one would abort the process.
    """
    with tf.init_scope():
        planned = tf.function(every).get_concrete_function(tf.TensorSpec((), tf.int64))
    answer = planned.structured_outputs
    if not tf.is_tensor(answer) or not answer.dtype.is_integer or answer.shape.rank not in (0, None):
        errors.check_every(answer)  # raises an error that says what it may be
    return planned


def scales_losses(optimizer: Any) -> bool:
    """Whether it is a LossScaleOptimizer, which has to see an inf to lower its scale."""
    return hasattr(optimizer, "inner_optimizer") and hasattr(optimizer, "dynamic_growth_steps")


def check_pairs(grads_and_vars: Any) -> list[tuple[Any, Any]]:
    """Accepts pairs of a gradient, or None, and its variable; each variable once, and gradients of its shape."""
    fix = "Pass zip(gradients, variables), as to the optimizer."
    pairs: list[Any] = [pair if isinstance(pair, tuple | list) else (pair,) for pair in grads_and_vars]
    named = set()
    for pair in pairs:
        if len(pair) != 2 or not (hasattr(pair[1], "assign") and hasattr(pair[1], "dtype")):
            shown = errors.received("grads_and_vars", pair[-1])
            raise TypeError(f"grads_and_vars must be pairs of a gradient and its variable. {shown} {fix}")
        if id(pair[1]) in named:
            raise ValueError(f"A variable stands twice in grads_and_vars. Received: {name_of(pair[1])} twice. {fix}")
        named.add(id(pair[1]))
    return [(g if g is None else _gradient_of(g, v), v) for g, v in pairs]


def _gradient_of(gradient: Any, variable: Any) -> Any:
    """The gradient as a tensor that has, or at run time must have, the variable's shape."""
    if not isinstance(gradient, tf.IndexedSlices):
        gradient = tf.convert_to_tensor(gradient)
    dtype, shape = tf.as_dtype(variable.dtype), tf.TensorShape(variable.shape)
    numbers = gradient.dtype.is_floating or gradient.dtype == dtype
    if not numbers or not shape.is_compatible_with(gradient.shape):
        raise ValueError(
            f"A gradient must have its variable's shape and a floating dtype. {errors.received('gradient', gradient)} "
            f"It is of {name_of(variable)}, of shape {tuple(variable.shape)}, dtype {dtype.name}."
        )
    unknown = isinstance(gradient, tf.Tensor) and not gradient.shape.is_fully_defined()
    return tf.ensure_shape(gradient, shape) if unknown else gradient


def name_of(variable: Any) -> str:
    """For people; a Keras variable's path says its layer."""
    return getattr(variable, "path", variable.name)


def loss_and_items(result: Any) -> tuple[tf.Tensor, Any]:
    """What loss_fn may return: the mean loss, an output that has it as its `.loss`, or one of these with its items."""
    loss, items = errors.loss_and_items(result)
    return check_loss(loss), items


def check_loss(loss: Any) -> tf.Tensor:
    """Accepts a scalar of a floating dtype."""
    if not tf.is_tensor(loss) or not loss.dtype.is_floating or loss.shape.rank not in (0, None):
        raise errors.loss_not_scalar(loss)
    return loss


def as_items(items: Any) -> tf.Tensor:
    """Accepts a number above zero, or a tensor of one element, whose value `checked` sees when the graph runs."""
    if not tf.is_tensor(items):
        return tf.constant(errors.check_items(items), COUNT)
    if not (items.dtype.is_floating or items.dtype.is_integer) or items.shape.num_elements() not in (1, None):
        errors.check_items(items)  # says what a number is
    return items


def checked(items: tf.Tensor) -> tf.Tensor:
    """The count as a `COUNT` scalar. Nothing that is computed from it runs if it is not above zero and finite.

    XLA makes no such checks: there it is NaN.
    """
    count = tf.cast(tf.reshape(items, ()), COUNT)
    good = tf.math.is_finite(count) & (count > 0)
    if under_xla():
        return tf.where(good, count, tf.constant(math.nan, COUNT))
    with tf.control_dependencies([require(good, lambda: not_items(items))]):
        return tf.identity(count)


def not_items(items: tf.Tensor) -> tf.Tensor:
    """What is wrong with a count that is not above zero and finite."""
    items = tf.reshape(items, ())
    shown = tf.strings.as_string(items) if items.dtype.is_integer else tf.strings.as_string(items, shortest=True)
    kind = f"({items.dtype.name})"
    not_positive = message(lambda: errors.check_items(-1), {"-1": shown, "(int)": kind})
    not_finite = message(lambda: errors.check_items(math.inf), {"inf": shown, "(float)": kind})
    return tf.where(tf.math.is_finite(tf.cast(items, COUNT)), not_positive, not_finite)


def require(holds: tf.Tensor, wrong: Callable[[], tf.Tensor]) -> Any:
    """An op that raises `tf.errors.InvalidArgumentError` where `holds` is false. XLA makes no such checks."""
    if under_xla():
        return tf.no_op()
    return tf.cond(holds, tf.no_op, lambda: tf.raw_ops.Assert(condition=False, data=[wrong()], summarize=1))


def message(mistake: Callable[[], Any], shown: Mapping[str, Any] = {}) -> tf.Tensor:
    """What `bigbatch.errors` says of a mistake, with what only the graph knows in the place of the numbers tried."""
    try:
        mistake()
    except ValueError as error:
        text = str(error)
    else:
        raise ValueError("no mistake")
    pieces = [text]
    for tried, value in shown.items():
        before, after = pieces.pop().split(tried, 1)
        value = tf.strings.as_string(value) if tf.is_tensor(value) and value.dtype != tf.string else value
        pieces += [before, value, after]
    return tf.strings.join(pieces)
