"""The split door: you hold the batch, and bigbatch stands where TensorFlow takes a gradient."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from bigbatch import errors
from bigbatch.tensorflow.checks import COUNT, as_items, check_loss, checked, require, under_xla, words
from bigbatch.tensorflow.sums import Gradient, cast, merged, scaled, widened

# A gradient in a loop: None, a tensor, or the (rows, values) of a sparse one.
Part = Any


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

    A loss that is inf or NaN is returned as it is, for a `LossScaleOptimizer` to see. Nothing waits for the device.
    """
    variables = list(variables)
    if micro_batch == "auto":
        from bigbatch.tensorflow.memory import fitting  # which traces this door

        def run(size: int) -> tuple[tf.Tensor, list[Gradient | None]]:
            return value_and_grad(loss_fn, batch, variables, micro_batch=size, dtype=dtype)

        return fitting(run, loss_fn, batch, variables, dtype)
    micro_batch = errors.check_micro_batch(micro_batch)
    batch = tf.nest.map_structure(lambda leaf: leaf if leaf is None else tf.convert_to_tensor(leaf), batch)
    length = _length(batch)
    if isinstance(length, int):
        micro_batch = min(micro_batch, length)

    def part(cut: Any, unit: tf.Tensor) -> Window:
        return _part(loss_fn, cut, unit, variables, dtype, micro_batch)

    window = (
        _eager(part, batch, length, micro_batch)
        if tf.executing_eagerly()
        else _graph(part, batch, length, micro_batch, variables)
    )
    if variables and all(gradient is None for gradient in window.gradients):
        raise errors.loss_without_gradient(window.loss)
    factor = window.unit / window.items
    means = [_finished(g, factor, v) for g, v in zip(window.gradients, variables, strict=True)]
    return scaled(window.loss, factor), means


class Window(NamedTuple):
    """The sums of the micro-batches so far, each weighted with its items / unit (see `bigbatch.law`).

    The unit is the first micro-batch's items: weights are then near 1, so that a half-precision backward pass sees
    gradients of the size that it would see without a window, and a window of one is left as it is.
    """

    loss: tf.Tensor  # shape=()
    items: tf.Tensor  # shape=(), COUNT
    unit: tf.Tensor  # shape=(), COUNT; 0 before the first micro-batch
    gradients: list[Part]


def _part(
    loss_fn: Callable[[Any], Any], cut: Any, unit: tf.Tensor, variables: list[Any], dtype: Any, micro_batch: int
) -> Window:
    """A window of one micro-batch."""
    with tf.GradientTape() as tape:
        result = loss_fn(cut)
        loss, items = result if isinstance(result, tuple) else (result, None)
    loss = check_loss(loss)
    leaf = next(leaf for leaf in tf.nest.flatten(cut) if leaf is not None)
    whole = items is None and leaf.shape[0] == micro_batch
    items = checked(as_items(tf.shape(leaf)[0] if items is None else items))
    unit = tf.where(tf.equal(unit, 0), items, unit)
    weight = items / unit
    # A loss in half precision would round the weight; then the gradients take it, once they are wide.
    early = loss.dtype.size >= tf.float32.size
    seed = [tf.cast(weight, loss.dtype)] if early and not whole else None
    late = weight if not early and not whole else None
    gradients = tape.gradient(loss, variables, output_gradients=seed)
    narrow = [widened(v.dtype, dtype) for v in variables]
    return Window(
        loss=_weighted(tf.cast(loss, widened(loss.dtype, tf.float32)), None if whole else weight),
        items=items,
        unit=unit,
        gradients=[_wide(g, late, to) for g, to in zip(gradients, narrow, strict=True)],
    )


def _weighted(value: Gradient, weight: tf.Tensor | None) -> Any:
    return value if weight is None else scaled(value, weight)


def _wide(gradient: Gradient | None, weight: tf.Tensor | None, dtype: tf.DType) -> Part:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices) and under_xla():
        gradient = tf.convert_to_tensor(gradient)
    gradient = _weighted(cast(gradient, dtype), weight)
    return (gradient.indices, gradient.values) if isinstance(gradient, tf.IndexedSlices) else gradient


def _add(a: Part, b: Part) -> Part:
    """The sum of two gradients, either of which may be missing."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tuple):
        return merged(tf.concat([a[0], b[0]], 0), tf.concat([a[1], b[1]], 0))
    return a + b


def _joined(a: Window, b: Window) -> Window:
    """Two windows in one; the unit is the first one's, which the second was weighted with."""
    gradients = [_add(g, h) for g, h in zip(a.gradients, b.gradients, strict=True)]
    return Window(a.loss + b.loss, a.items + b.items, b.unit, gradients)


def _eager(part: Callable[..., Window], batch: Any, length: int, micro_batch: int) -> Window:
    """Outside a tf.function: one micro-batch after the other, as written."""
    window = part(_cut(batch, 0, micro_batch), tf.zeros((), COUNT))
    for start in range(micro_batch, length, micro_batch):
        cut = _cut(batch, start, min(micro_batch, length - start))
        window = _joined(window, part(cut, window.unit))
    return window


def _graph(part: Callable[..., Window], batch: Any, length: Any, micro_batch: int, variables: list[Any]) -> Window:
    """In a tf.function: a loop over the micro-batches of full size, then what is left."""
    full, rest = length // micro_batch, length % micro_batch
    step = tf.function(part)
    # Traced before the loop, to learn which gradients are missing or sparse: a loop has to know beforehand.
    spec = tf.nest.map_structure(lambda leaf: None if leaf is None else _spec(leaf, micro_batch), batch)
    like = step.get_concrete_function(spec, tf.TensorSpec((), COUNT)).structured_outputs
    present = [g is not None for g in like.gradients]

    def body(i: tf.Tensor, window: Window) -> tuple[tf.Tensor, Window]:
        more = _packed(step(_cut(batch, i * micro_batch, micro_batch), window.unit), present)
        return i + 1, _joined(window, more)

    window = _zeros(like, variables)
    # More iterations in parallel would hold more than one micro-batch's activations at once.
    loop = tf.while_loop(
        lambda i, _: i < full,
        body,
        (tf.constant(0), window),
        shape_invariants=(tf.TensorShape(()), tf.nest.map_structure(_invariant, window)),
        parallel_iterations=1,
    )
    window = loop[1]

    def tail() -> Window:
        more = step(_cut(batch, full * micro_batch, rest), window.unit)
        return _joined(window, _packed(more, present))

    if not isinstance(rest, int):
        window = tf.cond(rest > 0, tail, lambda: window)
    elif rest:
        window = tail()
    gradients = iter(window.gradients)
    return window._replace(gradients=[next(gradients) if there else None for there in present])


def _packed(window: Window, present: list[bool]) -> Window:
    """Without the missing gradients, which no loop can carry."""
    if [g is not None for g in window.gradients] != present:
        raise ValueError(
            "loss_fn must depend on the same variables in every micro-batch of a batch. "
            f"Received: gradients for {sum(g is not None for g in window.gradients)} variables of a shorter last "
            f"micro-batch, and for {sum(present)} of the others. Choose between branches with tf.cond."
        )
    return window._replace(gradients=[g for g in window.gradients if g is not None])


def _zeros(like: Window, variables: list[Any]) -> Window:
    gradients = []
    for g, v in zip(like.gradients, variables, strict=True):
        if isinstance(g, tuple):
            gradients.append((tf.zeros([0], g[0].dtype), tf.zeros([0, *g[1].shape[1:]], g[1].dtype)))
        elif g is not None:
            gradients.append(tf.zeros(v.shape, g.dtype))
    return Window(tf.zeros((), like.loss.dtype), tf.zeros((), COUNT), tf.zeros((), COUNT), gradients)


def _invariant(tensor: tf.Tensor) -> tf.TensorShape:
    """The rows of a sparse gradient grow from none."""
    return tf.TensorShape([None, *tensor.shape[1:]]) if tensor.shape.rank and tensor.shape[0] == 0 else tensor.shape


def _finished(gradient: Part, factor: tf.Tensor, variable: Any) -> Gradient | None:
    """The mean, as GradientTape would have returned it; a sparse one names each row once."""
    if gradient is None:
        return None
    if isinstance(gradient, tuple):
        rows, values = merged(*gradient)
        gradient = tf.IndexedSlices(values, rows, tf.constant(tuple(variable.shape), rows.dtype))
    return cast(scaled(gradient, factor), tf.as_dtype(variable.dtype))


def _length(batch: Any) -> Any:
    """The leading dimension: a number where the graph knows it, else a tensor that is checked when the graph runs."""
    leaves = _leaves(batch, "batch")
    for where, leaf in leaves:
        if leaf.shape.rank == 0:
            raise errors.leaf_without_length(where, leaf)
    known = [(where, n) for where, leaf in leaves if leaf.shape.rank and (n := leaf.shape[0]) is not None]
    if known or not leaves:
        errors.check_lengths(known)
    if len(known) == len(leaves):
        return known[0][1]
    lengths = [(where, tf.shape(leaf)[0]) for where, leaf in leaves]
    first, length = lengths[0]
    checks = [require(length > 0, lambda: words(lambda: errors.check_lengths([(first, 0)])))]
    for where, other in lengths[1:]:
        checks.append(
            require(
                tf.equal(other, length),
                lambda where=where, other=other: words(
                    lambda: errors.check_lengths([(first, 111), (where, 222)]), {"111": length, "222": other}
                ),
            )
        )
    with tf.control_dependencies(checks):
        return tf.identity(length)


def _leaves(batch: Any, where: str) -> list[tuple[str, tf.Tensor]]:
    """Every tensor of a batch, with the place where it stands."""
    if tf.is_tensor(batch):
        return [(where, batch)]
    found = []
    if isinstance(batch, Mapping):
        for key in sorted(batch):
            found += _leaves(batch[key], f"{where}[{key!r}]")
    elif isinstance(batch, tuple) and (fields := getattr(batch, "_fields", None)):
        for key in fields:
            found += _leaves(getattr(batch, key), f"{where}.{key}")
    elif isinstance(batch, list | tuple):
        for key, child in enumerate(batch):
            found += _leaves(child, f"{where}[{key}]")
    else:  # what else tf.nest opens, or None
        found += [(where, leaf) for leaf in tf.nest.flatten(batch) if leaf is not None]
    return found


def _spec(leaf: tf.Tensor, length: int) -> tf.TensorSpec:
    return tf.TensorSpec(tf.TensorShape([length]).concatenate(leaf.shape[1:]), leaf.dtype)


def _cut(batch: Any, start: Any, size: Any) -> Any:
    """The same nesting with every tensor cut to `size` examples from `start` on."""

    def cut(leaf: tf.Tensor | None) -> tf.Tensor | None:
        if leaf is None:
            return None
        rest = tf.shape(leaf)[1:]
        part = tf.slice(leaf, tf.concat([[start], tf.zeros_like(rest)], 0), tf.concat([[size], rest], 0))
        known = size if isinstance(size, int) else None
        return tf.ensure_shape(part, tf.TensorShape([known]).concatenate(leaf.shape[1:]))

    return tf.nest.map_structure(cut, batch)
