"""A window on the TensorFlow backend: its sums, over one micro-batch after another.

The first micro-batch stands before a `tf.while_loop` over the others: it shows which gradients and which kinds of items
there are. Its items are the unit that the others' are divided by, so that a window of one is the plain step. `_loop` is
all that exactness needs; `summed` asks `bigbatch.fused.keras_tensorflow` to reach the same sums with less work.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree

from bigbatch.keras import batch, losses, noise_window
from bigbatch.keras.guard import guarded

try:
    from bigbatch.fused import keras_tensorflow as fused
except ModuleNotFoundError:  # the folder was left out, and the plain loop does everything
    fused = None

MicroStep = Callable[[list[Any], Any], "Sums"]


class Run(NamedTuple):
    """Micro-batches that one loop can take."""

    count: Any  # a number, or a tensor where only the graph knows
    slice: Callable[[Any], list[Any]]  # the arrays of the one with this index


class Sums(NamedTuple):
    """A window's sums so far.

    Attributes:
        gradients: Σ nᵢ·gᵢ / unit, for each kind of items and each trainable variable; None where there is none. From
            `bigbatch.fused`, one may be deferred: it has `to_dense()` and `times(factor)`.
        items: Σ nᵢ for each kind.
        losses: Σ nᵢ·lossᵢ and Σ nᵢ for each term of the loss, stacked.
        examples: how many examples there were.
        noise: the sum of `noise_window.part`, or None.
    """

    gradients: list[list[Any]]
    items: list[Any]
    losses: list[Any]
    examples: Any
    noise: Any


def add_up(model: Any, like: Any, runs: list[Run]) -> tuple[Sums, list[Any], list[losses.Term]]:
    """Forward and backward of all micro-batches: the sums, the unit of each kind of items, and the loss's terms."""
    build(model, batch.nest(like, runs[0].slice(0)))
    terms: list[losses.Term] = []
    with guarded(model, adds_up=not is_single(runs)):
        sums, unit = summed(model, functools.partial(micro_step, model, like, terms), runs)
    return sums, unit, terms


def is_single(runs: list[Run]) -> bool:
    """Whether there is one micro-batch, as far as the graph knows."""
    return len(runs) == 1 and isinstance(runs[0].count, int) and runs[0].count == 1


def summed(model: Any, make_step: Callable[..., MicroStep], runs: list[Run]) -> tuple[Sums, list[Any]]:
    """The sums of all micro-batches, and the unit of each kind of items.

    Args:
        model: a built model.
        make_step: makes the step of one micro-batch, with the `rewrite` that `micro_step` takes.
        runs: the micro-batches.
    """
    single = is_single(runs)
    none = tf.zeros([0], model._loss_tracker.dtype)
    if fused is None or single or model.run_eagerly:
        return _loop(make_step(), runs, none, single)
    if model.jit_compile:
        return _loop(make_step(fused.with_fast_convolutions), runs, none, single)
    shapes = [v.shape for v in model.trainable_variables]
    several = sum(run.count for run in runs) > 1
    return fused.loop(make_step(functools.partial(fused.factored, several, shapes)), runs, none, shapes)


def build(model: Any, data: Any) -> None:
    """Makes the variables that Keras makes when it first sees data: a loop's body may make none."""
    with tf.init_scope():
        # Not public. tests/keras/test_private.py fails when it moves.
        model._symbolic_build(data_batch=data)


def _loop(step: MicroStep, runs: list[Run], none: tf.Tensor, single: bool) -> tuple[Sums, list[Any]]:
    sums = step(runs[0].slice(0), none)
    unit = [tf.where(items > 0, items, tf.ones_like(items)) for items in sums.items]

    def add(sums: Sums, leaves: list[Any]) -> Any:
        more = step(leaves, tf.stack(unit))
        return tree.map_structure(lambda a, b: None if a is None else a + b, sums, more)

    start = 1
    for run in [] if single else runs:
        # A tf.while_loop carries no None: only the tensors are passed.
        tensors = batch.leaves(sums)

        def body(i: Any, tensors: list[Any], run: Run = run, sums: Sums = sums) -> tuple[Any, list[Any]]:
            return i + 1, batch.leaves(add(batch.nest(sums, tensors), run.slice(i)))

        # More iterations at once would hold more than one micro-batch's activations.
        _, tensors = tf.while_loop(
            lambda i, tensors, run=run: i < run.count, body, (tf.constant(start), tensors), parallel_iterations=1
        )
        sums, start = batch.nest(sums, tensors), 0
    return sums, unit


def micro_step(
    model: Any, like: Any, terms: list[losses.Term], rewrite: Callable[[Any], tuple[Any, Any]] | None = None
) -> MicroStep:
    """A function of one micro-batch's arrays and the unit that returns its sums, and fills `terms`.

    Args:
        model: a built model.
        like: the nesting of a micro-batch.
        terms: is filled with the loss's terms.
        rewrite: gets all gradients, in the graph that is being traced, and returns them as `Sums` has them and as
            `noise_window.part` takes them. By default they stay as they are.
    """
    replicas = model.distribute_strategy.num_replicas_in_sync
    variables = [v.value for v in model.trainable_variables]
    noise = noise_window.opened(model)

    def step(leaves: list[Any], unit: Any) -> Sums:
        x, y, sample_weight = batch.unpack(batch.nest(like, leaves))
        with tf.GradientTape(persistent=True) as tape:
            forward = losses.Forward(x, y, batch.call(model, x), sample_weight)
            terms[:] = losses.terms(model, forward, replicas=replicas, check=_check_values)
            kinds = losses.kinds(terms)
            scaled = [model.optimizer.scale_loss(value) for value, _ in kinds]
        # The first micro-batch comes without a unit; its weight is 1.
        unit = tf.concat([unit, tf.zeros([len(kinds)], unit.dtype)], 0)
        gradients = []
        for k, (value, (_, items)) in enumerate(zip(scaled, kinds, strict=True)):
            weight = tf.where(unit[k] > 0, tf.math.divide_no_nan(tf.cast(items, unit.dtype), unit[k]), 1)
            of_kind = tape.gradient(value, variables, output_gradients=[tf.cast(weight, value.dtype)])
            gradients.append([widened(g) for g in of_kind])
        gradients, measurable = rewrite(gradients) if rewrite else (gradients, gradients)
        losses.update_metrics(model, forward)
        return Sums(
            gradients,
            [tf.cast(items, unit.dtype) for _, items in kinds],
            [tf.stack([term.value * term.items, term.items]) for term in terms],
            losses.length(x),
            noise_window.part(noise, measurable, losses.length(x)),
        )

    return step


def widened(gradient: Any) -> Any:
    """A dense gradient, at least in float32; None stays None."""
    if gradient is None:
        return None
    gradient = tf.convert_to_tensor(gradient)
    return tf.cast(gradient, keras.backend.result_type(gradient.dtype.name, "float32"))


def _check_values(values: Any, x: Any, compiled: Any, y: Any, y_pred: Any) -> None:
    """`losses.check_values`, also where the graph does not know how many examples there are."""
    if isinstance(losses.length(x), int):
        losses.check_values(values, x, compiled, y, y_pred)
        return
    if all(tensor.shape.rank and tensor.shape[0] is None for tensor in tree.flatten((y, y_pred))):
        # A trace with an unusual number of examples shows whether the loss keeps it, and computes nothing.
        many = 1009
        specs: Any = tree.map_structure(lambda t: tf.TensorSpec([many, *t.shape[1:]], t.dtype), (y, y_pred))
        traced = tf.function(compiled.call, autograph=False).get_concrete_function(*specs).structured_outputs
        if traced.shape[0] is not None:
            if traced.shape[0] != many:
                raise losses.not_one_value_an_example(traced, f"say {many}")
            return
    # Only the data determines it. An error in the graph comes before the update.
    tf.debugging.assert_equal(tf.shape(values)[0], losses.length(x), "A loss must return one value an example.")
