"""The split API: you have the batch, and bigbatch takes the place of `tf.GradientTape`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_sparse import Gradient, scaled
from bigbatch.tensorflow.batch import length_of, tensors
from bigbatch.tensorflow.checks import check_dtype
from bigbatch.tensorflow.plan import fitting
from bigbatch.tensorflow.window import Task, in_graph, in_python, mean


@tf.autograph.experimental.do_not_convert  # loss_fn is converted where `in_graph` traces it
def value_and_grad(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Sequence[Any],
    *,
    micro_batch: int | Literal["auto"],
    dtype: Any = tf.float32,
) -> tuple[tf.Tensor, list[Gradient | None]]:
    """The whole batch's mean loss and its gradient, one micro-batch in memory at a time.

    What `tape.gradient(loss_fn(batch), variables)` would return, with the activations of `micro_batch` examples
    instead of all of them. In a `tf.function` it is one `tf.while_loop`::

        @tf.function
        def train_step(x, y):
            loss, grads = bb.value_and_grad(loss_fn, (x, y), model.trainable_variables, micro_batch=32)
            optimizer.apply_gradients(zip(grads, model.trainable_variables))
            return loss

    Args:
        loss_fn: takes a micro-batch, nested as `batch` is, and returns its mean loss, a scalar; or `(loss, items)`
            where the mean is over something other than the leading dimension, such as tokens. It is traced once, and
            once more for a shorter last micro-batch.
        batch: any nesting (`tf.nest`) of tensors that share the length of their leading dimension, which may be
            unknown when the graph is built. It is cut in order; the last micro-batch may be shorter.
        variables: what to differentiate with respect to, such as `model.trainable_variables`.
        micro_batch: examples in memory at once. Larger than the batch is fine: one micro-batch. "auto" plans the
            largest that fits what is free (see `plan`), once for each shape of batch, and logs what it chose.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 variables add up in float32
            and are rounded once, at the end. None adds up in the variables' own dtype.

    Returns:
        `(loss, gradients)`: the mean loss over all items, a scalar of at least float32, and for each variable the
        gradient of it, in the variable's dtype; None where the loss does not depend on the variable. A gradient that
        a gather makes `tf.IndexedSlices` stays that, each row once; with `jit_compile=True` it is dense.

    Raises:
        TypeError, ValueError: `micro_batch`, the batch, a loss or its items are not as described.
        tf.errors.InvalidArgumentError: the same, found when the graph runs. XLA makes no such checks.

    Where a dense layer's inputs and the gradients of its outputs are much smaller than its weights, those two are
    stored, and multiplied for many micro-batches at once. They take three quarters of the gradients' memory at most.

    A loss that is inf or NaN is returned as it is, for a `LossScaleOptimizer` to see. Nothing waits for the device.
    """
    variables, dtype = list(variables), check_dtype(dtype)
    if isinstance(micro_batch, str) and micro_batch == "auto":

        def run(size: int) -> tuple[tf.Tensor, list[Gradient | None]]:
            return value_and_grad(loss_fn, batch, variables, micro_batch=size, dtype=dtype)

        return fitting(run, loss_fn, batch, variables, dtype)
    micro_batch = errors.check_micro_batch(micro_batch)
    batch = tensors(batch)
    length = length_of(batch)
    if isinstance(length, int):
        micro_batch = min(micro_batch, length)
    task = Task(loss_fn, variables, dtype, micro_batch)
    window = (in_python if tf.executing_eagerly() else in_graph)(task, batch, length)
    if variables and all(gradient is None for gradient in window.gradients):
        raise errors.loss_without_gradient(window.loss)
    factor = window.unit / window.items
    gradients = [mean(g, factor, v) for g, v in zip(window.gradients, variables, strict=True)]
    return scaled(window.loss, factor), gradients
