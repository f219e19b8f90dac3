"""The update on the TensorFlow backend: a window's sums become means over all replicas, for the optimizer."""

import warnings
from typing import Any

import keras
import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import in_turn
from bigbatch.keras import losses, noise_window, skipped
from bigbatch.keras.backends.tensorflow.window import Sums


def update(model: Any, sums: Sums, unit: list[Any], terms: list[losses.Term]) -> dict[str, Any]:
    """Makes the update, and returns the model's logs.

    Args:
        model: the model.
        sums: of the window, on this replica.
        unit: what each kind's items are divided by in the sums of gradients.
        terms: the terms of any micro-batch's loss.
    """
    context = tf.distribute.get_replica_context()
    items, totals = sums.items, sums.losses
    if model.distribute_strategy.num_replicas_in_sync > 1:
        items, totals = context.all_reduce(tf.distribute.ReduceOp.SUM, (items, totals))
    terms_are_means, kinds_are_means = losses.are_means(terms)
    means = [
        tf.math.divide_no_nan(total, count) if is_mean else total
        for (total, count), is_mean in zip(map(tf.unstack, totals), terms_are_means, strict=True)
    ]
    factors = [
        tf.math.divide_no_nan(u, n) if is_mean else tf.ones_like(u)
        for u, n, is_mean in zip(unit, items, kinds_are_means, strict=True)
    ]
    loss = losses.report(model, terms, means, sums.examples)
    # Before the optimizer counts the update, and before it may overwrite the gradients.
    measurable = [[getattr(g, "to_dense", g) for g in of_kind] for of_kind in sums.gradients]
    window = noise_window.opened(model)
    noise_logs = noise_window.closed(window, sums.noise, measurable, factors, sums.examples, loss)

    def mean(variable: Any, *kinds: Any) -> Any:
        parts = [times(g, f) for g, f in zip(kinds, factors, strict=True) if g is not None]
        return tf.cast(tf.add_n(parts), variable.dtype) if parts else None

    variables = model.trainable_variables
    gradients = in_turn(mean, variables, *sums.gradients)
    if variables:
        apply(model, gradients, loss, skipped.counted(terms, items))
    else:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return {**model.get_metrics_result(), **noise_logs}


def times(gradient: Any, factor: tf.Tensor) -> tf.Tensor:
    """A window's sum times a scalar."""
    if hasattr(gradient, "times"):  # a deferred one
        return gradient.times(factor)
    return gradient * tf.cast(factor, gradient.dtype)


def apply(model: Any, gradients: list[Any], loss: Any, counted: list[Any]) -> None:
    """`optimizer.apply`, unless the window is not finite or, by what `skipped.counted` returned, has no items."""
    optimizer, variables = model.optimizer, model.trainable_variables
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1 and _reads_the_sum(optimizer):
        gradients = _on_the_first_replica(gradients)
    condition: Any = tf.add_n(counted) > 0 if counted else tf.constant(True)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):  # which tests finiteness itself, to move its scale
        if not counted:
            optimizer.apply(gradients, variables)
            return
    else:
        condition &= tf.math.is_finite(loss) & _all_finite([g for g in gradients if g is not None])

    def skip() -> Any:
        if counted and not model.jit_compile:  # XLA calls nothing in Python
            tf.numpy_function(skipped.report, counted, [])
        return tf.constant(False)

    if replicas == 1:
        tf.cond(condition, lambda: _applied(optimizer, gradients, variables), skip)
    else:
        _apply_on_all(optimizer, gradients, variables, condition)


def _apply_on_all(optimizer: Any, gradients: list[Any], variables: list[Any], condition: Any) -> None:
    """`optimizer.apply` on all replicas, unless the condition is false on one.

    An optimizer cannot merge its replicas inside a tf.cond of one replica, so there is one tf.cond for all of them.
    """
    context: Any = tf.distribute.get_replica_context()
    failed = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~condition, tf.int32))

    def merged(strategy: Any, failed: Any, gradients: list[Any]) -> None:
        condition = strategy.experimental_local_results(failed)[0] == 0

        def apply() -> Any:
            strategy.extended.call_for_each_replica(_applied, args=(optimizer, gradients, variables))
            return tf.constant(True)

        tf.cond(condition, apply, lambda: tf.constant(False))

    context.merge_call(merged, args=(failed, gradients))


def _all_finite(gradients: list[Any]) -> Any:
    """Whether the gradients hold no inf and no NaN."""

    def each() -> Any:
        return tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])

    # A sum of squares takes one pass. Where it is not finite, the squares may have overflowed, and all are tested.
    squares = [tf.cast(tf.nn.l2_loss(g), tf.float64) for g in gradients]
    return tf.cond(tf.math.is_finite(tf.add_n(squares)), lambda: tf.constant(True), each) if gradients else True


def _reads_the_sum(optimizer: Any) -> bool:
    """Whether it reads a gradient before Keras sums it over the replicas: to clip, or for loss scaling."""
    clipping = ("clipnorm", "global_clipnorm", "clipvalue")
    optimizers = (optimizer, *getattr(optimizer, "optimizers", ()))  # a MultiOptimizer's
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or any(
        getattr(one, name, None) is not None for one in optimizers for name in clipping
    )


def _on_the_first_replica(gradients: list[Any]) -> list[Any]:
    """The batch's gradient on one replica and zeros on the others, which Keras's sum over them then leaves as it is."""
    context: Any = tf.distribute.get_replica_context()
    present = [g for g in gradients if g is not None]
    reduced = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, present) if present else [])
    first = tf.equal(context.replica_id_in_sync_group, 0)
    return [None if g is None else tf.where(first, r := next(reduced), tf.zeros_like(r)) for g in gradients]


def _applied(optimizer: Any, gradients: list[Any], variables: list[Any]) -> Any:
    optimizer.apply(gradients, variables)
    return tf.constant(True)
