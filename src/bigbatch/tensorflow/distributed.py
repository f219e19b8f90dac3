"""One window on all replicas of a `tf.distribute` strategy: the sums over replicas when it closes, and their shares."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.engines.tensorflow_sparse import Gradient, scaled
from bigbatch.tensorflow.accumulators import DenseSum
from bigbatch.tensorflow.checks import COUNT


class Reduced(NamedTuple):
    """The window of all replicas, and its mean gradient in shares that come to it when they are added up."""

    items: tf.Tensor
    loss: tf.Tensor
    factor: tf.Tensor  # what makes a mean of a sum
    norm: tf.Tensor  # of the mean gradient; NaN where only the optimizer computes that
    finite: tf.Tensor
    share: Callable[[Callable[[list[Gradient]], None]], None]  # calls a function on each replica with its share


def clips(optimizer: Any) -> bool:
    """Whether it is a Keras optimizer that clips: each replica its own share, before it adds them up."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return any(getattr(inner, name, None) is not None for name in ("clipnorm", "global_clipnorm", "clipvalue"))


def reduced(sums: Sequence[DenseSum], items: tf.Variable, loss: tf.Variable, whole: bool) -> Reduced:
    """Adds up what the replicas hold, in the cross-replica context.

    That is three numbers, and the optimizer adds up the gradients: each replica's share is its own sum over all items.
    An optimizer that clips has to be given the `whole`: then it is added up here as well, the first replica's share is
    the mean, and the others' is zero, which no clipping changes.
    """
    strategy = tf.distribute.get_strategy()

    def stats() -> tf.Tensor:
        squares = [tf.cast(tf.nn.l2_loss(one.total), COUNT) for one in sums]
        return tf.stack([items, loss, tf.add_n(squares) if squares else tf.zeros((), COUNT)])

    all_items, all_loss, squares = tf.unstack(strategy.reduce("SUM", strategy.run(stats), axis=None))
    factor = 1 / all_items
    if not whole or not sums or strategy.num_replicas_in_sync == 1:
        # Where one replica has an inf, all get NaN, for a LossScaleOptimizer that checks its own share.
        finite = tf.math.is_finite(squares)
        own = tf.where(finite, factor, float("nan"))
        alone = tf.sqrt(2 * squares) * factor  # l2_loss is half of the squares' sum
        norm = alone if strategy.num_replicas_in_sync == 1 else tf.constant(float("nan"), COUNT)
        return Reduced(
            all_items,
            all_loss,
            factor,
            norm,
            finite,
            lambda work: strategy.run(lambda: work([one.mean(own) for one in sums])),
        )

    def add_up() -> Any:
        return tf.distribute.get_replica_context().all_reduce("SUM", [one.mean(factor) for one in sums])

    means = strategy.run(add_up)
    norm = tf.cast(tf.linalg.global_norm([strategy.experimental_local_results(m)[0] for m in means]), COUNT)

    def share(work: Callable[[list[Gradient]], None]) -> None:
        def here(means: list[tf.Tensor]) -> None:
            first = tf.equal(tf.distribute.get_replica_context().replica_id_in_sync_group, 0)
            work([scaled(m, tf.cast(first, COUNT)) for m in means])

        strategy.run(here, args=(means,))

    return Reduced(all_items, all_loss, factor, norm, tf.math.is_finite(norm), share)
