"""The loop of Keras's window on TensorFlow, over factored and split gradients.

In a graph, a dense layer's weight gradient is stored as its two factors, and those of many micro-batches are multiplied
as one matmul (`tensorflow_deferred`). A table's gradient is added as the few rows that it has (`tensorflow_lookups`).
Products with a large transposed matrix are computed without transposing it (`tensorflow_transposes`).

Measured in benchmarks/keras_fit.md. It does nothing for a window of one micro-batch and in eager execution. Under XLA
only `with_fast_convolutions` applies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.fused import tensorflow_conv_layout
from bigbatch.fused.tensorflow_deferred import FactorBuffer, FactoredGrad, capacity, factored_grad
from bigbatch.fused.tensorflow_lookups import SplitGradient, split_gradient, zeros
from bigbatch.fused.tensorflow_transposes import with_fast_products

# All sums are those of `bigbatch.keras.backends.tensorflow.window`, as are runs and the step of one micro-batch.
Sums = Any
Run = Any
MicroStep = Callable[[list[Any], Any], Sums]


class DeferredSum(NamedTuple):
    """A sum of gradients of which the last factors are not multiplied yet."""

    total: tf.Tensor  # of those that are, and of dense ones; a 1×1 zero before any
    factors: FactoredGrad

    def to_dense(self) -> tf.Tensor:
        """The sum."""
        return self.times(tf.ones([], self.total.dtype))

    def times(self, factor: tf.Tensor) -> tf.Tensor:
        """The sum times a scalar. Where there is no total yet, only one factor is multiplied by it, which is small."""
        return tf.cond(
            tf.equal(tf.size(self.total), 1),
            lambda: self.factors.times(factor),
            lambda: (self.total + self.factors.to_dense()) * tf.cast(factor, self.total.dtype),
        )


class DeferredAccumulator(NamedTuple):
    """The same inside a loop, which adds more factors."""

    total: tf.Tensor
    buffer: FactorBuffer

    def flushed(self) -> "DeferredAccumulator":
        """With the products of all buffered factors in the total."""

        def total() -> tf.Tensor:
            return self.total + self.buffer.concat().to_dense()

        return DeferredAccumulator(
            tf.cond(self.buffer.left.size() > 0, total, lambda: self.total), self.buffer.emptied()
        )


class LoopState(NamedTuple):
    """A window inside a loop, which carries no None: `()` stands for a gradient that does not exist."""

    sums: Sums  # with a DeferredAccumulator for each FactoredGrad of the micro-batches
    unit: tf.Tensor  # shape=(kinds,); 0 until there are items


def with_fast_convolutions(gradients: list[list[Any]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """A micro-batch's gradients for XLA, for the sums and for the noise scale."""
    gradients = tensorflow_conv_layout.with_fast_convolutions(tf.compat.v1.get_default_graph(), gradients)
    return gradients, gradients


def factored(several: Any, shapes: list[Any], gradients: list[list[Any]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """A micro-batch's gradients, factored or split where the graph shows that they can be.

    Args:
        several: whether the window has more than one micro-batch, a bool or a scalar tensor.
        shapes: those of the variables.
        gradients: dense ones, for each kind of items and each variable; None where there is none.

    Returns:
        The gradients for the sums, and for the noise scale: there a function stands for each that is not dense, and
        returns it as a dense tensor.
    """
    gradients = [
        [factored_grad(g) or split_gradient(g, shape) or g for g, shape in zip(of_kind, shapes, strict=True)]
        for of_kind in gradients
    ]
    gradients = with_fast_products(tf.compat.v1.get_default_graph(), several, gradients)

    def measurable(g: Any, shape: Any) -> Any:
        if isinstance(g, SplitGradient):
            return lambda: g.added_to(zeros(shape, g.dtype))
        return g.to_dense if isinstance(g, FactoredGrad) else g

    return gradients, [list(map(measurable, of_kind, shapes)) for of_kind in gradients]


def loop(step: MicroStep, runs: list[Run], none: tf.Tensor, shapes: list[Any]) -> tuple[Sums, list[Any]]:
    """The sums of all runs, and the unit of each kind of items; a `DeferredSum` for each factored gradient.

    Args:
        step: of one micro-batch, with gradients from `factored`.
        runs: the micro-batches.
        none: an empty unit.
        shapes: those of the variables.
    """
    steps = _traced(step, runs, none)
    like = steps[0].get_concrete_function().structured_outputs
    buffered = capacity(g for of_kind in like.gradients for g in of_kind)
    state = _zeros(like, shapes, none.dtype)
    for step, run in zip(steps, runs, strict=True):
        if buffered is None or step is not steps[0]:
            state = _add_run(step, run, tf.constant(0), run.count, state)
            continue

        def add_group(start: Any, state: LoopState, step: MicroStep = step, run: Run = run) -> tuple[Any, LoopState]:
            state, empty = _flushed(state)
            all_fit = empty & (run.count - start <= buffered.alone)
            stop = tf.where(all_fit, run.count, tf.minimum(start + buffered.beside_sums, run.count))
            return stop, _add_run(step, run, start, stop, state, defer=True)

        state = _while(add_group, tf.constant(0), run.count, state)

    def finished(g: Any) -> Any:
        if isinstance(g, DeferredAccumulator):
            return DeferredSum(g.total, g.buffer.concat())
        return None if _is_absent(g) else g

    unit = tf.where(state.unit > 0, state.unit, tf.ones_like(state.unit))
    sums = _mapped(finished, state).sums
    return sums._replace(noise=None if _is_absent(sums.noise) else sums.noise), tf.unstack(unit)


def _traced(step: MicroStep, runs: list[Run], none: tf.Tensor) -> list[Any]:
    """The micro-batch's graph for each run: one for those as long as the first, and one for all others."""
    first = [run.slice(0) for run in runs]
    usual = first[0][0].shape[0]
    groups = [[f for f in first if (f[0].shape[0] == usual) == alike] for alike in (True, False)]

    def trace(group: list[list[Any]], length: int | None) -> Any:
        leaves = [[length, *_common(column)] for column in zip(*group, strict=True)]
        signature = [tf.TensorSpec(shape, x.dtype) for shape, x in zip(leaves, group[0], strict=True)]
        return tf.function(step, input_signature=[signature, tf.TensorSpec([None], none.dtype)], autograph=False)

    steps = [trace(group, length) if group else None for group, length in zip(groups, (usual, None), strict=True)]
    return [steps[0 if f[0].shape[0] == usual else 1] for f in first]


def _common(tensors: Any) -> list[int | None]:
    """The dimensions after the first, with None where the tensors differ."""
    return [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]


def _zeros(like: Sums, shapes: list[Any], dtype: tf.DType) -> LoopState:
    """A window before its first micro-batch, for variables of these shapes."""

    def zero(g: Any, shape: Any) -> Any:
        if isinstance(g, FactoredGrad):
            return DeferredAccumulator(tf.zeros([1, 1], g.left.dtype), FactorBuffer.empty(None, g))
        return () if g is None else zeros(shape, g.dtype)

    scalars = tf.nest.map_structure(lambda x: tf.zeros(x.shape, x.dtype), _scalars(like))
    sums = scalars._replace(gradients=[list(map(zero, of_kind, shapes)) for of_kind in like.gradients])
    return LoopState(sums, tf.zeros([len(like.items)], dtype))


def _add_run(step: MicroStep, run: Run, start: Any, stop: Any, state: LoopState, defer: bool = False) -> LoopState:
    """With the run's micro-batches from `start` to `stop`; with `defer`, their factors are buffered."""

    def body(i: Any, state: LoopState) -> tuple[Any, LoopState]:
        more = step(run.slice(i), state.unit)
        items = tf.stack(more.items)
        unit = tf.where(state.unit > 0, state.unit, tf.where(items > 0, items, tf.ones_like(items)))
        place = i - start if defer else None
        gradients = [
            [_added(g, h, place) for g, h in zip(totals, of_kind, strict=True)]
            for totals, of_kind in zip(state.sums.gradients, more.gradients, strict=True)
        ]
        scalars = tf.nest.map_structure(tf.add, _scalars(state.sums), _scalars(more))
        return i + 1, LoopState(scalars._replace(gradients=gradients), unit)

    return _while(body, start, stop, state)


def _scalars(sums: Sums) -> Sums:
    """All but the gradients, as a loop has them."""
    return sums._replace(gradients=[], noise=() if sums.noise is None else sums.noise)


def _is_absent(g: Any) -> bool:
    return isinstance(g, tuple) and not g


def _added(g: Any, h: Any, place: Any) -> Any:
    """A sum and one more gradient; factors go to a place in the buffer, or are multiplied where it is None."""
    if h is None:
        return ()
    if isinstance(h, FactoredGrad) and place is not None:
        return g._replace(buffer=g.buffer.write(place, h))
    if isinstance(h, SplitGradient):
        return h.added_to(g)
    h = h.to_dense() if isinstance(h, FactoredGrad) else h
    return g._replace(total=g.total + h) if isinstance(g, DeferredAccumulator) else g + h


def _flushed(state: LoopState) -> tuple[LoopState, Any]:
    """With the products of all buffered factors in the totals, and whether there were none so far."""
    totals: list[tf.Tensor] = []

    def flush(g: Any) -> Any:
        if not isinstance(g, DeferredAccumulator):
            return g
        # One after the other: TensorFlow would compute all products before it adds the first.
        with tf.control_dependencies(totals[-1:]):
            g = g.flushed()
        totals.append(g.total)
        return g

    return _mapped(flush, state), tf.equal(tf.size(totals[0]), 1)


def _mapped(work: Callable[[Any], Any], state: LoopState) -> LoopState:
    gradients = [[work(g) for g in of_kind] for of_kind in state.sums.gradients]
    return state._replace(sums=state.sums._replace(gradients=gradients))


def _while(body: Callable[..., Any], start: Any, stop: Any, state: LoopState) -> LoopState:
    def invariant(g: Any) -> Any:
        if isinstance(g, DeferredAccumulator):
            any_shape: Any = tf.TensorShape([None, None])
            no_buffer: Any = FactorBuffer(None, None)  # pyright: ignore[reportArgumentType]
            return DeferredAccumulator(any_shape, no_buffer)
        return () if _is_absent(g) else g.shape

    shapes = tf.nest.map_structure(lambda x: x.shape, state._replace(sums=_scalars(state.sums)))
    gradients = _mapped(invariant, state).sums.gradients
    invariants = shapes._replace(sums=shapes.sums._replace(gradients=gradients))
    # More iterations at once would hold more than one micro-batch's activations.
    return tf.while_loop(
        lambda i, _: i < stop, body, (start, state), (tf.TensorShape(()), invariants), parallel_iterations=1
    )[1]
