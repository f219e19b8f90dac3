"""A loss over the whole batch on the TensorFlow backend: two `tf.while_loop`s over its micro-batches, one update."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_ordering import in_turn
from bigbatch.keras import batch, losses, whole_batch
from bigbatch.keras.backends.tensorflow import steps
from bigbatch.keras.backends.tensorflow.update import apply, times
from bigbatch.keras.backends.tensorflow.window import MicroStep, Run, Sums, build, is_single, summed, widened
from bigbatch.keras.guard import guarded


def split_step(model: Any, micro_batch: int) -> Callable[[Any], dict[str, Any]]:
    """`train_step` for a whole batch."""
    return steps.split_step(model, micro_batch, _update, begins=True)


def _update(model: Any, data: Any, runs: list[Run]) -> dict[str, Any]:
    """One update from the micro-batches of `runs`: those of one length, then perhaps a shorter one."""
    build(model, batch.nest(data, runs[0].slice(0)))
    variables = [v.value for v in model.trainable_variables]
    length = losses.length([tf.convert_to_tensor(leaf) for leaf in batch.leaves(data)])
    with guarded(model, adds_up=not is_single(runs)):
        first = _FirstRuns(model, data, runs, length)
        y_pred, added = first.all()
        sources = [y for y in keras.tree.flatten(y_pred) if whole_batch.is_floating(y)]
        with tf.GradientTape() as tape:
            tape.watch([*sources, *added])
            loss = whole_batch.loss_of(model, data, y_pred, added)
            scaled = model.optimizer.scale_loss(loss)
        found = tape.gradient(scaled, [*sources, *added, *variables])
        if all(g is None for g in found):
            raise errors.loss_without_gradient(loss)
        of_outputs, of_added = found[: len(sources)], found[len(sources) :][: len(added)]
        second = functools.partial(_second_run, model, data, first, _Cotangents(of_outputs, of_added, length))
        sums, _ = summed(model, second, first.runs_with_places())
    direct = [widened(g) for g in found[len(sources) + len(added) :]]

    def total(variable: Any, looped: Any, own: Any) -> Any:
        parts = [] if looped is None else [times(looped, tf.ones([]))]
        parts += [] if own is None else [own]
        return tf.cast(tf.add_n(parts), variable.dtype) if parts else None

    gradients = in_turn(total, model.trainable_variables, sums.gradients[0], direct)
    if variables:
        apply(model, gradients, loss, [])
    else:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return whole_batch.logs_of(model, data, y_pred, loss, length)


class _Cotangents(NamedTuple):
    """The loss's gradients: of the floating outputs, one entry an example, and of the added losses; None for none."""

    of_outputs: list[Any]
    of_added: list[Any]
    length: Any


class _FirstRuns:
    """The forward passes of all micro-batches, and what each of them started from."""

    def __init__(self, model: Any, data: Any, runs: list[Run], length: Any):
        self.model, self.data, self.runs, self.length = model, data, runs, length
        self.state = whole_batch.state_of(model)
        self.values = [tf.convert_to_tensor(v.value) for v in self.state]

    def all(self) -> tuple[Any, list[Any]]:
        """The whole batch's outputs, and the means of the losses that are added; the variables move."""
        leaves = self.runs[0].slice(0)
        self.size = losses.length(leaves)
        made = self._forward(leaves, self.values)
        self.written = made.written
        parts = [[y] for y in made.arrays]
        self.starts = [[self.values[k][None]] for k in self.written]
        now = [made.state[k] for k in self.written], self._weighted(made, leaves)
        for k, run in enumerate(self.runs):
            if k == 0 and is_single([run]):
                continue
            now, arrays, starts = self._run(run, 1 if k == 0 else 0, now, made)
            parts = [[*before, y] for before, y in zip(parts, arrays, strict=True)]
            self.starts = [[*before, s] for before, s in zip(self.starts, starts, strict=True)]
        self.starts = [tf.concat(of_one, 0) for of_one in self.starts]
        for k, value in zip(self.written, now[0], strict=True):
            self.state[k].assign(value)
        return whole_batch.joined(made, [tf.concat(of_one, 0) for of_one in parts]), now[1]

    def runs_with_places(self) -> list[Run]:
        """The micro-batches again, each leaf-list with the places of its examples in the batch and of its start."""
        counts = [run.count for run in self.runs]

        def placed(run: Run, before: Any, i: Any) -> list[Any]:
            leaves, piece = run.slice(i), before + i
            places = piece * self.size + tf.range(tf.shape(leaves[0])[0])
            static = leaves[0].shape[:1]
            return [*leaves, tf.ensure_shape(places, static), tf.ensure_shape(tf.zeros_like(places) + piece, static)]

        befores = [0, *counts[:-1]]
        return [
            Run(run.count, functools.partial(placed, run, before))
            for run, before in zip(self.runs, befores, strict=True)
        ]

    def again(self, leaves: list[Any], piece: Any) -> whole_batch.Forward:
        """The forward pass of a micro-batch, from what it started from."""
        values = list(self.values)
        for k, starts in zip(self.written, self.starts, strict=True):
            values[k] = starts[piece]
        return self._forward(leaves, values)

    def _forward(self, leaves: list[Any], values: list[Any]) -> whole_batch.Forward:
        x, _, _ = batch.unpack(batch.nest(self.data, leaves))
        return whole_batch.forward(self.model, x, list(zip(self.state, values, strict=True)), self.state)

    def _weighted(self, made: whole_batch.Forward, leaves: list[Any]) -> list[Any]:
        n = losses.length(leaves)
        return [added * whole_batch.part_of(n, self.length, added.dtype) for added in made.added]

    def _run(self, run: Run, start: int, now: Any, like: whole_batch.Forward) -> Any:
        """A run's micro-batches from `start` on: the state and the added losses after them, outputs, and starts."""
        outputs = [_array(y.dtype, run.count - start, [None, *y.shape[1:]]) for y in like.arrays]
        starts = [_array(value.dtype, run.count - start, value.shape) for value in now[0]]

        def body(i: Any, now: Any, outputs: list[Any], starts: list[Any]) -> Any:
            leaves, (state, added) = run.slice(i), now
            values = list(self.values)
            for k, value in zip(self.written, state, strict=True):
                values[k] = value
            made = self._forward(leaves, values)
            added = [a + b for a, b in zip(added, self._weighted(made, leaves), strict=True)]
            outputs = [a.write(i - start, y) for a, y in zip(outputs, made.arrays, strict=True)]
            starts = [a.write(i - start, value) for a, value in zip(starts, state, strict=True)]
            return i + 1, ([made.state[k] for k in self.written], added), outputs, starts

        _, now, outputs, starts = tf.while_loop(
            lambda i, *_: i < run.count, body, (tf.constant(start), now, outputs, starts), parallel_iterations=1
        )
        return (
            now,
            [_flat(a) if self.model.jit_compile else a.concat() for a in outputs],
            [a.stack() for a in starts],
        )


def _second_run(
    model: Any, data: Any, first: _FirstRuns, cotangents: _Cotangents, rewrite: Callable[[Any], Any] | None = None
) -> MicroStep:
    """A function of a micro-batch's arrays and places that returns its part of the gradients, as `Sums`."""
    variables = [v.value for v in model.trainable_variables]

    def step(leaves: list[Any], unit: Any) -> Sums:
        *leaves, places, piece = leaves
        with tf.GradientTape() as tape:
            made = first.again(leaves, piece[0])
        n = losses.length(leaves)
        outputs = [y for y in keras.tree.flatten(made.y_pred) if whole_batch.is_floating(y)]
        pairs = [
            (y, g[places[0] : places[0] + n])
            for y, g in zip(outputs, cotangents.of_outputs, strict=True)
            if g is not None
        ]
        pairs += [
            (y, g * whole_batch.part_of(n, cotangents.length, g.dtype))
            for y, g in zip(made.added, cotangents.of_added, strict=True)
            if g is not None
        ]
        gradients = tape.gradient([y for y, _ in pairs], variables, output_gradients=[g for _, g in pairs])
        gradients = [[widened(g) for g in gradients]]
        gradients = rewrite(gradients)[0] if rewrite else gradients
        one = tf.ones([], model._loss_tracker.dtype)
        return Sums(gradients, [one], [], n, None)

    return step


def _array(dtype: Any, count: Any, shape: Any) -> tf.TensorArray:
    return tf.TensorArray(dtype, size=count, element_shape=shape, infer_shape=False)


def _flat(array: tf.TensorArray) -> tf.Tensor:
    """The entries one after the other, where all have one length."""
    stacked = array.stack()
    return tf.reshape(stacked, tf.concat([[tf.shape(stacked)[0] * tf.shape(stacked)[1]], tf.shape(stacked)[2:]], 0))
