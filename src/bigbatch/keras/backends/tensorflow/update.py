"""The update on the TensorFlow backend: a window's sums become means over all replicas, for the optimizer."""

import warnings
from typing import Any

import keras
import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import in_turn
from bigbatch.keras import losses, noise, skips
from bigbatch.keras.backends.tensorflow.window import Owed, Sums, dense


def update(model: Any, sums: Sums, unit: list[Any], described: list[losses.Term]) -> dict[str, Any]:
    """Makes the update, and returns the model's logs.

    Args:
        model: the model.
        sums: of the window, on this replica.
        unit: what the gradients' sums are divided by, for each kind of items.
        described: the terms of any micro-batch's loss.
    """
    context = tf.distribute.get_replica_context()
    items, totals = sums.items, sums.losses
    if model.distribute_strategy.num_replicas_in_sync > 1:
        items, totals = context.all_reduce(tf.distribute.ReduceOp.SUM, (items, totals))
    terms_divide, kinds_divide = losses.quotients(described)
    means = [
        tf.math.divide_no_nan(total, count) if divide else total
        for (total, count), divide in zip(map(tf.unstack, totals), terms_divide, strict=True)
    ]
    factors = [
        tf.math.divide_no_nan(u, n) if divide else tf.ones_like(u)
        for u, n, divide in zip(unit, items, kinds_divide, strict=True)
    ]
    total = losses.report(model, described, means, sums.examples)
    # Before the optimizer counts the update, and does what it likes with the gradients.
    found = dense(sums.gradients, model.trainable_variables)
    noise_logs = noise.closed(noise.opened(model), sums.noise, found, factors, sums.examples, total)

    def mean(variable: Any, *kinds: Any) -> Any:
        parts = [_times(g, f) for g, f in zip(kinds, factors, strict=True) if g is not None]
        return tf.cast(tf.add_n(parts), variable.dtype) if parts else None

    variables = model.trainable_variables
    gradients = in_turn(mean, variables, *sums.gradients)
    if variables:
        _apply(model, gradients, variables, total, skips.counted(described, items))
    else:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return {**model.get_metrics_result(), **noise_logs}


def _times(gradient: Any, factor: tf.Tensor) -> tf.Tensor:
    return gradient.times(factor) if isinstance(gradient, Owed) else gradient * tf.cast(factor, gradient.dtype)


def _apply(model: Any, gradients: list[Any], variables: list[Any], total: Any, counted: list[Any]) -> None:
    """`optimizer.apply`, unless the window is not finite or has no items."""
    optimizer = model.optimizer
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1 and _wants_the_sum(optimizer):
        gradients = _on_the_first_replica(gradients)
    made: Any = tf.constant(True)
    if counted:
        made = tf.add_n(counted) > 0
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):  # which asks for itself, and takes note
        if not counted:
            optimizer.apply(gradients, variables)
            return
    else:
        made &= tf.math.is_finite(total) & _all_finite([g for g in gradients if g is not None])

    def skip() -> Any:
        if counted and not model.jit_compile:  # XLA calls nothing in Python
            tf.numpy_function(skips.say, counted, [])
        return tf.constant(False)

    if replicas == 1:
        tf.cond(made, lambda: _applied(optimizer, gradients, variables), skip)
        return

    # A replica may not ask inside a tf.cond, so all replicas ask together.
    made = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~made, tf.int32)) == 0

    def merged(strategy: Any, made: Any, gradients: list[Any]) -> None:
        one = strategy.experimental_local_results(made)[0]

        def apply() -> Any:
            strategy.extended.call_for_each_replica(_applied, args=(optimizer, gradients, variables))
            return tf.constant(True)

        tf.cond(one, apply, lambda: tf.constant(False))

    tf.distribute.get_replica_context().merge_call(merged, args=(made, gradients))


def _all_finite(gradients: list[Any]) -> Any:
    """Whether no number in them is inf or NaN."""

    def each() -> Any:
        return tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])

    # A sum of squares takes one pass, and is nearly always finite; if not, that may be the squares' fault.
    squares = [tf.cast(tf.nn.l2_loss(g), tf.float64) for g in gradients]
    return tf.cond(tf.math.is_finite(tf.add_n(squares)), lambda: tf.constant(True), each) if gradients else True


def _wants_the_sum(optimizer: Any) -> bool:
    """Whether it looks at a gradient before Keras sums it over the replicas: to clip, or for loss scaling."""
    clipping = ("clipnorm", "global_clipnorm", "clipvalue")
    several = (optimizer, *getattr(optimizer, "optimizers", ()))  # a MultiOptimizer's
    return isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or any(
        getattr(one, name, None) is not None for one in several for name in clipping
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
