"""The split API's loop, with gradients that are stored as factors or in terms.

It is the twin of the loop in `bigbatch.tensorflow.window`. What it buys, where that was measured and where it does
nothing stand in tensorflow_deferred.py, tensorflow_lookups.py, tensorflow_transposes.py and tensorflow_conv_layout.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from bigbatch.engines import tensorflow_sparse
from bigbatch.engines.tensorflow_ordering import in_turn
from bigbatch.engines.tensorflow_ordering import loop as plain_loop
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.fused.tensorflow_conv_layout import with_fast_convolutions
from bigbatch.fused.tensorflow_deferred import FactorBuffer, FactoredGrad, capacity, factored_grad
from bigbatch.fused.tensorflow_lookups import SplitGradient, split_gradient
from bigbatch.fused.tensorflow_transposes import with_fast_products


@tf.autograph.experimental.do_not_convert
def stored(gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """The same gradients, as a `FactoredGrad` or a `SplitGradient` where the graph allows it."""

    def one(gradient: Any, variable: Any) -> Any:
        if not tf.is_tensor(gradient):  # missing, or rows
            return gradient
        parts = factored_grad(gradient) or (None if under_xla() else split_gradient(gradient, variable.shape))
        return gradient if parts is None else parts

    return [one(g, v) for g, v in zip(gradients, variables, strict=True)]


@tf.autograph.experimental.do_not_convert
def rewritten(gradients: list[Any], several: Any) -> list[Any]:
    """The gradients of a micro-batch's graph, which is rewritten to compute them faster.

    Args:
        gradients: of the graph that is being traced.
        several: whether the window has more than one micro-batch, as `with_fast_products` takes it.
    """
    graph = tf.compat.v1.get_default_graph()
    if not under_xla():
        return with_fast_products(graph, several, gradients)
    return gradients if several is False else with_fast_convolutions(graph, gradients)


def add(a: Any, b: Any) -> Any:
    """The sum of two gradients in any form, either of which may be missing. A `SplitGradient` is `b` alone."""
    if isinstance(a, FactoredGrad) and isinstance(b, FactoredGrad):
        return a.concat(b)
    if a is None or b is None:
        return b if a is None else a
    a = _dense(a)
    return b.added_to(a) if isinstance(b, SplitGradient) else tensorflow_sparse.add(a, _dense(b))


def _dense(a: Any) -> Any:
    return a.to_dense() if isinstance(a, FactoredGrad) else a


def loop(
    one: Callable[[tf.Tensor, tf.Tensor], Any],
    joined: Callable[..., Any],
    empty: Callable[[Any], Any],
    like: Any,
    count: Any,
) -> Any:
    """The window of `count` micro-batches of full size.

    Factors are stored for as many micro-batches as have space, and then flushed: added to the sums as one matmul.

    Args:
        one: makes the window of one micro-batch from its index and the unit.
        joined: makes one window of two, with a function that adds two gradients.
        empty: makes the window before the first micro-batch for others like this, with sums that are `zeros`.
        like: the window of one micro-batch.
        count: a number, or a tensor where only the run will tell.
    """
    limits = capacity(like.gradients)
    if limits is None:
        return _group(one, joined, empty(like), tf.constant(0), count)

    def deferred(window: Any, start: tf.Tensor, stop: Any, size: int) -> Any:
        sums, pairs = window.gradients, zip(window.gradients, like.gradients, strict=True)
        buffers = [FactorBuffer.empty(size, p) if isinstance(p, FactoredGrad) else g for g, p in pairs]
        window = _group(one, joined, window._replace(gradients=buffers), start, stop)
        return window._replace(gradients=in_turn(_flushed, sums, window.gradients))

    if isinstance(count, int) and count <= limits.alone:  # one group: no sum of factored gradients is needed
        others = [None if isinstance(g, FactoredGrad) else g for g in like.gradients]
        return deferred(empty(like._replace(gradients=others)), tf.constant(0), count, count)

    def body(start: tf.Tensor, window: Any) -> tuple[tf.Tensor, Any]:
        stop = tf.minimum(start + limits.beside_sums, count)
        return stop, deferred(window, start, stop, limits.beside_sums)

    return plain_loop(body, tf.constant(0), count, empty(like))


def _group(
    one: Callable[[tf.Tensor, tf.Tensor], Any], joined: Callable[..., Any], window: Any, start: tf.Tensor, stop: Any
) -> Any:
    """The window with the micro-batches from `start` to `stop`, whose factors go into the window's buffers."""

    def body(i: tf.Tensor, window: Any) -> tuple[tf.Tensor, Any]:
        def add_or_write(g: Any, h: Any) -> Any:
            return g.write(i - start, h) if isinstance(g, FactorBuffer) else add(g, h)

        return i + 1, joined(window, one(i, window.unit), add_or_write)

    return plain_loop(body, start, stop, window)


def _flushed(total: Any, g: Any) -> Any:
    return add(total, g.concat()) if isinstance(g, FactorBuffer) else g
