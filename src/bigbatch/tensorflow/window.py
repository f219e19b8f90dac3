"""One window of the split API: the sums of its micro-batches, outside a `tf.function` and inside.

Each micro-batch's loss and gradients are weighted with items / unit (see `bigbatch.law`). The unit is the first
micro-batch's items. Weights are then near 1, a backward pass in half precision has gradients of the usual size, and a
window of one micro-batch stays as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import loop
from bigbatch.engines.tensorflow_sparse import Gradient, SparseRows, cast, merged, scaled
from bigbatch.engines.tensorflow_sparse import add as plain_add
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.tensorflow.batch import slice_of, spec_of
from bigbatch.tensorflow.checks import COUNT, as_items, checked, loss_and_items, widened
from bigbatch.tensorflow.guard import bits_of, check_unmoved, check_unwritten

try:
    from bigbatch.fused import tensorflow as fused
except ModuleNotFoundError:  # the wing was left out; the plain loop does everything
    fused = None

add = plain_add if fused is None else fused.add


class Task(NamedTuple):
    """What a window is made from."""

    loss_fn: Callable[[Any], Any]
    variables: list[Any]
    dtype: Any  # the narrowest to accumulate in, or None
    micro_batch: int


class Window(NamedTuple):
    """The sums of the micro-batches so far."""

    loss: tf.Tensor  # shape=()
    items: tf.Tensor  # shape=(), COUNT
    unit: tf.Tensor  # shape=(), COUNT; 0 before the first micro-batch
    gradients: list[Any]  # None where the loss does not depend on the variable, a dense tensor, or SparseRows


def forward_backward(task: Task, batch: Any, unit: tf.Tensor) -> Window:
    """The window of one micro-batch, for the unit of those before it."""
    with tf.GradientTape() as tape:
        loss, items = loss_and_items(task.loss_fn(batch))
    leaf = next(leaf for leaf in tf.nest.flatten(batch) if leaf is not None)
    whole = items is None and leaf.shape[0] == task.micro_batch
    if items is None and leaf.shape[0] is not None:
        items = tf.constant(leaf.shape[0], COUNT)
    else:
        items = checked(as_items(tf.shape(leaf)[0] if items is None else items))
    unit = tf.where(tf.equal(unit, 0), items, unit)
    weight = items / unit
    # The backward pass takes the weight, at no cost. A loss in half precision would round it: then the gradients take
    # it, in the dtype to accumulate in.
    early = loss.dtype.size >= tf.float32.size
    seed = [tf.cast(weight, loss.dtype)] if early and not whole else None
    late = weight if not early and not whole else None
    pairs = zip(tape.gradient(loss, task.variables, output_gradients=seed), task.variables, strict=True)
    mean = tf.cast(loss, widened(loss.dtype, tf.float32))
    return Window(
        loss=mean if whole else scaled(mean, weight),
        items=items,
        unit=unit,
        gradients=[wide(g, late, widened(v.dtype, task.dtype)) for g, v in pairs],
    )


def wide(gradient: Gradient | None, weight: tf.Tensor | None, dtype: tf.DType) -> Any:
    """The gradient in the dtype to accumulate in, times its weight."""
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices) and under_xla():
        gradient = tf.convert_to_tensor(gradient)
    widened = cast(gradient, dtype)
    widened = widened if weight is None else scaled(widened, weight)
    return SparseRows(widened.indices, widened.values) if isinstance(widened, tf.IndexedSlices) else widened


def stored(task: Task, window: Window) -> Window:
    """With the gradients as the loop stores them."""
    return window if fused is None else window._replace(gradients=fused.stored(window.gradients, task.variables))


def joined(a: Window, b: Window, add: Callable[[Any, Any], Any] = add) -> Window:
    """The sum of two windows; `b` was weighted with the unit of `a`, if that has one."""
    gradients = [add(g, h) for g, h in zip(a.gradients, b.gradients, strict=True)]
    return Window(a.loss + b.loss, a.items + b.items, b.unit, gradients)


def in_python(task: Task, batch: Any, length: int) -> Window:
    """Outside a tf.function: a loop over the micro-batches that a debugger can step through."""
    several = length > task.micro_batch
    before = bits_of(task.variables) if several else None
    window = forward_backward(task, slice_of(batch, 0, task.micro_batch), tf.zeros((), COUNT))
    for start in range(task.micro_batch, length, task.micro_batch):
        part = slice_of(batch, start, min(task.micro_batch, length - start))
        window = joined(window, forward_backward(task, part, window.unit))
    if before is not None:
        check_unmoved(task.variables, before)
    return window


def in_graph(task: Task, batch: Any, length: Any) -> Window:
    """Inside a tf.function: a tf.while_loop over the micro-batches of full size, then the remainder."""
    size, variables = task.micro_batch, task.variables
    full, remainder, several = length // size, length % size, length > size

    def traced(part: Any, unit: tf.Tensor) -> Window:
        window = stored(task, forward_backward(task, part, unit))
        return window if fused is None else window._replace(gradients=fused.rewritten(window.gradients, several))

    step = tf.function(traced)
    # Traced before the loop, which has to know beforehand which gradients are missing or sparse.
    spec = tf.nest.map_structure(lambda leaf: None if leaf is None else spec_of(leaf, size), batch)
    concrete = step.get_concrete_function(spec, tf.TensorSpec((), COUNT))
    if several is not False:
        check_unwritten(concrete.graph, variables)
    present = [g is not None for g in concrete.structured_outputs.gradients]
    like = _without_missing(concrete.structured_outputs, present)

    def one(start: Any, size: Any, unit: tf.Tensor) -> Window:
        return _without_missing(step(slice_of(batch, start, size), unit), present)

    def of_index(i: tf.Tensor, unit: tf.Tensor) -> Window:
        return one(i * size, size, unit)

    shapes = [v.shape for v, there in zip(variables, present, strict=True) if there]
    if fused is None:
        empty = _empty(like, shapes)
        window = loop(lambda i, w: (i + 1, joined(w, of_index(i, w.unit))), tf.constant(0), full, empty)
    else:
        window = fused.loop(of_index, joined, lambda like: _empty(like, shapes), like, full)

    def with_remainder() -> Window:
        return joined(window, one(full * size, remainder, window.unit))

    if not isinstance(remainder, int):
        window = tf.cond(remainder > 0, with_remainder, lambda: window)
    elif remainder:
        window = with_remainder()
    gradients = iter(window.gradients)
    return window._replace(gradients=[next(gradients) if there else None for there in present])


def _without_missing(window: Window, present: list[bool]) -> Window:
    """The window without the gradients that are None, which no loop can carry."""
    if [g is not None for g in window.gradients] != present:
        raise ValueError(
            "loss_fn must depend on the same variables in every micro-batch of a batch. "
            f"Received: gradients for {sum(g is not None for g in window.gradients)} variables of a shorter last "
            f"micro-batch, and for {sum(present)} of the others. Choose between branches with tf.cond."
        )
    return window._replace(gradients=[g for g in window.gradients if g is not None])


def _empty(like: Window, shapes: list[Any]) -> Window:
    """The window before its first micro-batch, for variables of these shapes."""
    none = tf.zeros((), COUNT)
    return Window(tf.zeros((), like.loss.dtype), none, none, empty_sums(like.gradients, shapes))


def empty_sums(gradients: list[Any], shapes: list[Any]) -> list[Any]:
    """Sums of nothing, to which gradients like these are added."""

    def zero(gradient: Any, shape: Any) -> Any:
        if gradient is None:
            return None
        if isinstance(gradient, SparseRows):
            row = gradient.values.shape[1:]
            return SparseRows(tf.zeros([0], gradient.indices.dtype), tf.zeros([0, *row], gradient.values.dtype))
        return (tf.zeros if fused is None else fused.zeros)(shape, gradient.dtype)

    return list(map(zero, gradients, shapes))


def mean(gradient: Any, factor: tf.Tensor, variable: Any) -> Gradient | None:
    """A sum times `factor`, as GradientTape would have returned it; a sparse one has each row once."""
    if gradient is None:
        return None
    if fused is not None and isinstance(gradient, fused.FactoredGrad):
        return gradient.times(factor)
    if isinstance(gradient, SparseRows):
        rows, values = merged(*gradient)
        gradient = tf.IndexedSlices(values, rows, tf.constant(tuple(variable.shape), rows.dtype))
    return cast(scaled(gradient, factor), tf.as_dtype(variable.dtype))
