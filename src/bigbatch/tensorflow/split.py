"""The split door: you hold the batch, and bigbatch stands where TensorFlow takes a gradient."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_ordering import in_turn
from bigbatch.engines.tensorflow_sparse import Gradient, SparseRows, scaled
from bigbatch.fused.tensorflow_conv_layout import with_fast_convolutions
from bigbatch.fused.tensorflow_deferred import FactorBuffer, FactoredGrad, capacity
from bigbatch.fused.tensorflow_lookups import zeros
from bigbatch.fused.tensorflow_transposes import with_fast_products
from bigbatch.tensorflow.accumulators import widened
from bigbatch.tensorflow.batch import length_of, slice_of, spec_of, tensors
from bigbatch.tensorflow.checks import COUNT, as_items, check_dtype, checked, loss_and_items, under_xla
from bigbatch.tensorflow.guard import bits_of, check_unmoved, check_unwritten
from bigbatch.tensorflow.window import Window, add, finished, joined, part_of


@tf.autograph.experimental.do_not_convert  # loss_fn is converted where `_graph` traces it
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

    Where a dense layer's inputs and the gradients of its outputs are much smaller than its weights, those two are kept,
    and multiplied out for many micro-batches at once. They take three quarters of the gradients' memory at most.

    A loss that is inf or NaN is returned as it is, for a `LossScaleOptimizer` to see. Nothing waits for the device.
    """
    variables, dtype = list(variables), check_dtype(dtype)
    if isinstance(micro_batch, str) and micro_batch == "auto":
        from bigbatch.tensorflow.plan import fitting  # which traces this door

        def run(size: int) -> tuple[tf.Tensor, list[Gradient | None]]:
            return value_and_grad(loss_fn, batch, variables, micro_batch=size, dtype=dtype)

        return fitting(run, loss_fn, batch, variables, dtype)
    micro_batch = errors.check_micro_batch(micro_batch)
    batch = tensors(batch)
    length = length_of(batch)
    if isinstance(length, int):
        micro_batch = min(micro_batch, length)

    def part(cut: Any, unit: tf.Tensor) -> Window:
        return _part(loss_fn, cut, unit, variables, dtype, micro_batch)

    window = (
        _eager(part, batch, length, micro_batch, variables)
        if tf.executing_eagerly()
        else _graph(part, batch, length, micro_batch, variables)
    )
    if variables and all(gradient is None for gradient in window.gradients):
        raise errors.loss_without_gradient(window.loss)
    factor = window.unit / window.items
    means = [finished(g, factor, v) for g, v in zip(window.gradients, variables, strict=True)]
    return scaled(window.loss, factor), means


def _part(
    loss_fn: Callable[[Any], Any], cut: Any, unit: tf.Tensor, variables: list[Any], dtype: Any, micro_batch: int
) -> Window:
    """A window of one micro-batch."""
    with tf.GradientTape() as tape:
        loss, items = loss_and_items(loss_fn(cut))
    leaf = next(leaf for leaf in tf.nest.flatten(cut) if leaf is not None)
    whole = items is None and leaf.shape[0] == micro_batch
    if items is None and leaf.shape[0] is not None:
        items = tf.constant(leaf.shape[0], COUNT)
    else:
        items = checked(as_items(tf.shape(leaf)[0] if items is None else items))
    unit = tf.where(tf.equal(unit, 0), items, unit)
    weight = items / unit
    # A loss in half precision would round the weight; then the gradients take it, once they are wide.
    early = loss.dtype.size >= tf.float32.size
    seed = [tf.cast(weight, loss.dtype)] if early and not whole else None
    late = weight if not early and not whole else None
    gradients = tape.gradient(loss, variables, output_gradients=seed)
    mean = tf.cast(loss, widened(loss.dtype, tf.float32))
    return Window(
        loss=mean if whole else scaled(mean, weight),
        items=items,
        unit=unit,
        gradients=[
            part_of(g, late, widened(v.dtype, dtype), v.shape) for g, v in zip(gradients, variables, strict=True)
        ],
    )


def _eager(part: Callable[..., Window], batch: Any, length: int, micro_batch: int, variables: list[Any]) -> Window:
    """Outside a tf.function: one micro-batch after the other, as written."""
    several = length > micro_batch
    noted = bits_of(variables) if several else None
    window = part(slice_of(batch, 0, micro_batch), tf.zeros((), COUNT))
    for start in range(micro_batch, length, micro_batch):
        cut = slice_of(batch, start, min(micro_batch, length - start))
        window = joined(window, part(cut, window.unit))
    if noted is not None:
        check_unmoved(variables, noted)
    return window


def _graph(part: Callable[..., Window], batch: Any, length: Any, micro_batch: int, variables: list[Any]) -> Window:
    """In a tf.function: a loop over the micro-batches of full size, then what is left."""
    full, rest = length // micro_batch, length % micro_batch
    several = length > micro_batch

    def quick(cut: Any, unit: tf.Tensor) -> Window:
        window, graph = part(cut, unit), tf.compat.v1.get_default_graph()
        if not under_xla():
            return window._replace(gradients=with_fast_products(graph, several, window.gradients))
        if several is False:
            return window
        return window._replace(gradients=with_fast_convolutions(graph, window.gradients))

    step = tf.function(quick)
    # Traced before the loop, to learn which gradients are missing, sparse or products: a loop has to know beforehand.
    spec = tf.nest.map_structure(lambda leaf: None if leaf is None else spec_of(leaf, micro_batch), batch)
    concrete = step.get_concrete_function(spec, tf.TensorSpec((), COUNT))
    if several is not False:
        check_unwritten(concrete.graph, variables)
    like = concrete.structured_outputs
    present = [g is not None for g in like.gradients]

    def one(start: Any, size: Any, unit: tf.Tensor) -> Window:
        return _packed(step(slice_of(batch, start, size), unit), present)

    shapes = [v.shape for v, there in zip(variables, present, strict=True) if there]
    window = _loop(lambda i, unit: one(i * micro_batch, micro_batch, unit), _packed(like, present), shapes, full)

    def tail() -> Window:
        return joined(window, one(full * micro_batch, rest, window.unit))

    if not isinstance(rest, int):
        window = tf.cond(rest > 0, tail, lambda: window)
    elif rest:
        window = tail()
    gradients = iter(window.gradients)
    return window._replace(gradients=[next(gradients) if there else None for there in present])


def _loop(one: Callable[[tf.Tensor, tf.Tensor], Window], like: Window, shapes: list[Any], full: Any) -> Window:
    """The micro-batches of full size in turn; `one` takes a number and the unit, and returns one `like` that."""
    room = capacity(like.gradients)
    if room is None or (isinstance(full, int) and full <= room.alone):
        return _group(one, like, _nothing(like, shapes, of_products=False), tf.constant(0), full, full)

    def body(start: tf.Tensor, window: Window) -> tuple[tf.Tensor, Window]:
        stop = tf.minimum(start + room.beside_sums, full)
        return stop, _group(one, like, window, start, stop, room.beside_sums)

    return _while(body, full, tf.constant(0), _nothing(like, shapes, of_products=True))


def _group(
    one: Callable[[tf.Tensor, tf.Tensor], Window], like: Window, window: Window, start: tf.Tensor, stop: Any, room: int
) -> Window:
    """Those from `start` to `stop`, added to a window: products as such where it has no sum to add them to."""

    def body(i: tf.Tensor, window: Window) -> tuple[tf.Tensor, Window]:
        more = one(i, window.unit)
        gradients = [
            g.write(i - start, h) if isinstance(g, FactorBuffer) else add(g, h)
            for g, h in zip(window.gradients, more.gradients, strict=True)
        ]
        return i + 1, joined(window._replace(gradients=[]), more._replace(gradients=[]))._replace(gradients=gradients)

    def multiplied_out(total: Any, h: Any) -> Any:
        return add(total, h.concat()) if isinstance(h, FactorBuffer) else h

    sums = window.gradients
    parts = [
        FactorBuffer.empty(room, p) if isinstance(p, FactoredGrad) else g
        for g, p in zip(sums, like.gradients, strict=True)
    ]
    window = _while(body, stop, start, window._replace(gradients=parts))
    return window._replace(gradients=in_turn(multiplied_out, sums, window.gradients))


def _while(body: Callable[..., Any], stop: Any, start: tf.Tensor, window: Window) -> Window:
    # More iterations in parallel would hold more than one micro-batch's activations at once.
    return tf.while_loop(
        lambda i, _: i < stop,
        body,
        (start, window),
        shape_invariants=(tf.TensorShape(()), tf.nest.map_structure(_invariant, window)),
        parallel_iterations=1,
    )[1]


def _packed(window: Window, present: list[bool]) -> Window:
    """Without the missing gradients, which no loop can carry."""
    if [g is not None for g in window.gradients] != present:
        raise ValueError(
            "loss_fn must depend on the same variables in every micro-batch of a batch. "
            f"Received: gradients for {sum(g is not None for g in window.gradients)} variables of a shorter last "
            f"micro-batch, and for {sum(present)} of the others. Choose between branches with tf.cond."
        )
    return window._replace(gradients=[g for g in window.gradients if g is not None])


def _nothing(like: Window, shapes: list[Any], of_products: bool) -> Window:
    """A window before its first micro-batch, for variables of these shapes; with or without sums for products."""

    def zero(part: Any, shape: Any) -> Any:
        if isinstance(part, SparseRows):
            empty = [0, *part.values.shape[1:]]
            return SparseRows(tf.zeros([0], part.indices.dtype), tf.zeros(empty, part.values.dtype))
        if isinstance(part, FactoredGrad) and not of_products:
            return None
        return zeros(shape, part.left.dtype if isinstance(part, FactoredGrad) else part.dtype)

    none = tf.zeros((), COUNT)
    sums = [zero(part, shape) for part, shape in zip(like.gradients, shapes, strict=True)]
    return Window(tf.zeros((), like.loss.dtype), none, none, sums)


def _invariant(tensor: Any) -> Any:
    """The rows of a sparse gradient grow from none."""
    if isinstance(tensor, tf.TensorArray):
        return None
    return tf.TensorShape([None, *tensor.shape[1:]]) if tensor.shape.rank and tensor.shape[0] == 0 else tensor.shape
