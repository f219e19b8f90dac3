"""A window on the TensorFlow backend: one `tf.while_loop` over its micro-batches, one `optimizer.apply`.

The first micro-batch stands before the loop. It tells which gradients there are and which kinds of items, its
gradients are the accumulators' first values, and its items are the unit that the others are weighed in: a window of one
is then the plain step, bit for bit. All of them call one traced function.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree

from bigbatch.engines import tensorflow_chance
from bigbatch.keras import batch, loss, noise

Pull = Callable[[Any], list[Any]]


class Sums(NamedTuple):
    """A window's sums so far.

    Attributes:
        gradients: Σ nᵢ·gᵢ / unit, for each kind of items and each trainable variable; None where there is none.
        items: Σ nᵢ for each kind.
        losses: Σ nᵢ·lossᵢ for each term of the loss.
        examples: how many examples there were.
        noise: the sum of `noise.part`, or None.
    """

    gradients: list[list[Any]]
    items: list[Any]
    losses: list[Any]
    examples: Any
    noise: Any


def split_step(model: Any, micro_batch: int, window: Callable[..., Any] | None = None) -> Callable[[Any], Any]:
    """`train_step` for a whole batch. It returns what `window` does with the micro-batches: by default, an update."""
    window = window or _window

    def train_step(data: Any) -> Any:
        static = batch.check(data)
        leaves = [tf.convert_to_tensor(leaf) for leaf in batch.leaves(data)]
        length = loss.length(leaves)
        micro_batches = -(-length // micro_batch)

        def dynamic(i: Any) -> list[Any]:
            return [leaf[i * micro_batch : (i + 1) * micro_batch] for leaf in leaves]

        if not model.jit_compile:
            return window(model, data, [(micro_batches, dynamic)])

        # XLA wants static shapes inside a loop: full micro-batches there, and the shorter last one after it.
        size = tf.minimum(micro_batch, length) if static is None else min(micro_batch, length)
        full = length // size

        def fixed(i: Any) -> list[Any]:
            return [tf.slice(x, [i * size] + [0] * (len(x.shape) - 1), [size, *x.shape[1:]]) for x in leaves]

        def rest(i: Any) -> list[Any]:
            return [leaf[full * size :] for leaf in leaves]

        runs = [(full, fixed), (1, rest)]
        if static is not None:
            return window(model, data, runs if length % size else runs[:1])
        return tf.cond(length % size > 0, lambda: window(model, data, runs), lambda: window(model, data, runs[:1]))

    return train_step


def gather(model: Any, window: list[Any]) -> Any:
    """A window's micro-batches as what `stream_step`'s `train_step` takes: few tensors, however many there are."""
    return model.distribute_strategy.run(_gather, args=(window, bool(model.jit_compile)))


def _gather(window: list[Any], stacked: bool) -> list[Any]:
    """Runs of micro-batches: (nesting, lengths of the micro-batches), joined along the examples.

    They part where another dimension than the first changes; the largest come first, as each order would be traced.
    With `stacked`, for XLA, a run's micro-batches have one shape and lie along a new first dimension, and the second of
    the pair is None.
    """
    if tf.distribute.get_strategy().num_replicas_in_sync == 1:  # else a short micro-batch leaves some with no example
        for data in window:
            batch.check(data)
    rows = [[tf.convert_to_tensor(leaf) for leaf in batch.leaves(data)] for data in window]

    def shape(row: list[Any]) -> list[tuple[int, ...]]:
        return [tuple(x.shape if stacked else x.shape[1:]) for x in row]

    rows.sort(key=shape, reverse=True)
    shapes = [shape(row) for row in rows]
    starts = [i for i in range(len(rows)) if i == 0 or shapes[i] != shapes[i - 1]]
    runs = []
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        join = tf.stack if stacked else lambda column: tf.concat(column, 0)
        leaves = [join(column) for column in zip(*rows[start:stop], strict=True)]
        sizes: Any = [row[0].shape[0] for row in rows[start:stop]]
        lengths = None if stacked else tf.constant(sizes)
        runs.append((batch.nest(window[0], leaves), lengths))
    return runs


def stream_step(model: Any) -> Callable[[Any], dict[str, Any]]:
    """`train_step` for a window, as `gather` makes it."""

    def train_step(window: list[Any]) -> dict[str, Any]:
        return _window(model, window[0][0], [_pulled(*run) for run in window])

    return train_step


def _pulled(data: Any, lengths: Any) -> tuple[Any, Pull]:
    leaves = batch.leaves(data)
    if lengths is None:
        return tf.shape(leaves[0])[0], lambda i: [leaf[i] for leaf in leaves]
    stops = tf.cumsum(lengths)
    return tf.size(lengths), lambda i: [leaf[stops[i] - lengths[i] : stops[i]] for leaf in leaves]


def _window(model: Any, like: Any, runs: list[tuple[Any, Pull]]) -> dict[str, Any]:
    """One update from the micro-batches of `runs`, each run a count and a function of the index within it."""
    return _update(model, *add_up(model, like, runs))


def add_up(model: Any, like: Any, runs: list[tuple[Any, Pull]]) -> tuple[Sums, list[Any], list[loss.Term]]:
    """Forward and backward of all micro-batches: the sums, what the items are weighed in, and the loss's terms."""
    first = runs[0][1](0)
    _build(model, batch.nest(like, first))
    described: list[loss.Term] = []
    take = _micro_step(model, like, described)
    alone = len(runs) == 1 and isinstance(runs[0][0], int) and runs[0][0] == 1
    if not (alone or model.run_eagerly or model.jit_compile):
        # Traced once, whatever the micro-batches' lengths are.
        signature = [
            tf.TensorSpec([None, *_common([run[1](0)[n] for run in runs])], x.dtype) for n, x in enumerate(first)
        ]
        unit_signature = tf.TensorSpec([None], model._loss_tracker.dtype)
        take = tf.function(take, input_signature=[signature, unit_signature], autograph=False)
    sums = take(first, tf.zeros([0], model._loss_tracker.dtype))
    unit = [tf.where(items > 0, items, tf.ones_like(items)) for items in sums.items]

    def add(sums: Sums, leaves: list[Any]) -> Any:
        more = take(leaves, tf.stack(unit))
        return tree.map_structure(lambda a, b: None if a is None else a + b, sums, more)

    start = 1
    for count, pull in [] if alone else runs:
        # Only what is there is carried: a loop knows no None.
        held = batch.leaves(sums)

        def body(i: Any, held: list[Any], pull: Pull = pull, sums: Sums = sums) -> tuple[Any, list[Any]]:
            return i + 1, batch.leaves(add(batch.nest(sums, held), pull(i)))

        # More iterations at once would hold more than one micro-batch's activations.
        _, held = tf.while_loop(
            lambda i, held, count=count: i < count, body, (tf.constant(start), held), parallel_iterations=1
        )
        sums, start = batch.nest(sums, held), 0
    return sums, unit, described


def _common(tensors: list[Any]) -> list[int | None]:
    """The dimensions after the first, with None where the tensors differ."""
    return [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]


def _build(model: Any, data: Any) -> None:
    """Makes the variables that Keras makes when it first sees data: a loop's body may make none."""
    with tf.init_scope():
        model._symbolic_build(data_batch=data)


def _micro_step(model: Any, like: Any, described: list[loss.Term]) -> Callable[[list[Any], Any], Sums]:
    replicas = model.distribute_strategy.num_replicas_in_sync
    variables = [v.value for v in model.trainable_variables]
    noisy = noise.opened(model)

    def take(leaves: list[Any], unit: Any) -> Sums:
        x, y, sample_weight = batch.unpack(batch.nest(like, leaves))
        with tf.GradientTape(persistent=True) as tape:
            y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
            terms = loss.terms(model, x, y, y_pred, sample_weight, replicas, _check_values)
            kinds = loss.kinds(terms)
            scaled = [model.optimizer.scale_loss(value) for value, _ in kinds]
        described[:] = terms
        # The first micro-batch comes without a unit, and weighs 1.
        unit = tf.concat([unit, tf.zeros([len(kinds)], unit.dtype)], 0)
        gradients = []
        for k, (value, (_, items)) in enumerate(zip(scaled, kinds, strict=True)):
            weight = tf.where(unit[k] > 0, tf.math.divide_no_nan(tf.cast(items, unit.dtype), unit[k]), 1)
            found = tape.gradient(value, variables, output_gradients=[tf.cast(weight, value.dtype)])
            gradients.append([_wide(g) for g in found])
        loss.update_metrics(model, x, y, y_pred, sample_weight)
        return Sums(
            gradients,
            [tf.cast(items, unit.dtype) for _, items in kinds],
            [tf.stack([term.value * term.items, term.items]) for term in terms],
            loss.length(x),
            noise.part(noisy, gradients, loss.length(x)),
        )

    return take


def _check_values(values: Any, x: Any, compiled: Any, y: Any, y_pred: Any) -> None:
    """`loss.check_values`, also where the graph does not know how many examples there are."""
    if isinstance(loss.length(x), int):
        loss.check_values(values, x, compiled, y, y_pred)
        return
    if all(tensor.shape.rank and tensor.shape[0] is None for tensor in tree.flatten((y, y_pred))):
        # What would the loss make of so many? A trace tells, which computes nothing.
        many = 1009
        specs: Any = tree.map_structure(lambda t: tf.TensorSpec([many, *t.shape[1:]], t.dtype), (y, y_pred))
        asked = tf.function(compiled.call, autograph=False).get_concrete_function(*specs).structured_outputs
        if asked.shape[0] is not None:
            if asked.shape[0] != many:
                raise loss.lost_the_batch(asked, f"say {many}")
            return
    # Only the data can tell. An error in the graph comes before the update.
    tf.debugging.assert_equal(tf.shape(values)[0], loss.length(x), "A loss must return one value an example.")


def _wide(gradient: Any) -> Any:
    """Dense, and at least float32."""
    if gradient is None:
        return None
    gradient = tf.convert_to_tensor(gradient)
    return tf.cast(gradient, keras.backend.result_type(gradient.dtype.name, "float32"))


def _update(model: Any, sums: Sums, unit: list[Any], described: list[loss.Term]) -> dict[str, Any]:
    context = tf.distribute.get_replica_context()
    items, losses = sums.items, sums.losses
    if model.distribute_strategy.num_replicas_in_sync > 1:
        items, losses = context.all_reduce(tf.distribute.ReduceOp.SUM, (items, losses))
    terms_divide, kinds_divide = loss.quotients(described)
    means = [
        tf.math.divide_no_nan(total, count) if divide else total
        for (total, count), divide in zip(map(tf.unstack, losses), terms_divide, strict=True)
    ]
    factors = [
        tf.math.divide_no_nan(u, n) if divide else tf.ones_like(u)
        for u, n, divide in zip(unit, items, kinds_divide, strict=True)
    ]
    total = loss.report(model, described, means, sums.examples)
    # Before the optimizer counts the update, and does what it likes with the gradients.
    noise_logs = noise.closed(noise.opened(model), sums.noise, sums.gradients, factors, sums.examples, total)

    variables = model.trainable_variables
    gradients = []
    for i, v in enumerate(variables):
        parts = [
            g[i] * tf.cast(factor, g[i].dtype)
            for g, factor in zip(sums.gradients, factors, strict=True)
            if g[i] is not None
        ]
        gradients.append(tf.cast(tf.add_n(parts), v.dtype) if parts else None)
    if variables:
        _apply(model, gradients, variables, total)
    else:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
    return {**model.get_metrics_result(), **noise_logs}


def _apply(model: Any, gradients: list[Any], variables: list[Any], total: Any) -> None:
    """`optimizer.apply`, unless the window is not finite. Loss scaling asks that itself, and takes note."""
    optimizer = model.optimizer
    if model.distribute_strategy.num_replicas_in_sync > 1 and _wants_the_sum(optimizer):
        gradients = _on_the_first_replica(gradients)
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer.apply(gradients, variables)
        return
    finite = tf.reduce_all(
        [tf.math.is_finite(total), *[tf.reduce_all(tf.math.is_finite(g)) for g in gradients if g is not None]]
    )
    if model.distribute_strategy.num_replicas_in_sync == 1:
        tf.cond(finite, lambda: _applied(optimizer, gradients, variables), lambda: tf.constant(False))
        return

    # A replica may not ask inside a tf.cond, so all replicas ask together.
    finite = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~finite, tf.int32)) == 0

    def merged(strategy: Any, finite: Any, gradients: list[Any]) -> None:
        one = strategy.experimental_local_results(finite)[0]

        def apply() -> Any:
            strategy.extended.call_for_each_replica(_applied, args=(optimizer, gradients, variables))
            return tf.constant(True)

        tf.cond(one, apply, lambda: tf.constant(False))

    tf.distribute.get_replica_context().merge_call(merged, args=(finite, gradients))


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


Objective = Callable[[list[Any], Any], list[tuple[Any, Any]]]


def gradients(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """What `objective` returns of arrays and a scale, and the gradient of the first of each pair."""
    variables = [v.value for v in model.trainable_variables]

    def run(leaves: list[Any], scale: Any) -> tuple[list[Any], list[list[Any]]]:
        with tf.GradientTape(persistent=True) as tape:
            found = objective(leaves, scale)
        return found, [tape.gradient(value, variables) for value, _ in found]

    return run


def losses(model: Any, objective: Objective) -> Callable[[list[Any], Any], tuple[list[Any], list[list[Any]]]]:
    """As `gradients`, without them."""
    return lambda leaves, scale: (objective(leaves, scale), [])


def chance_kept(model: Any) -> AbstractContextManager[None]:
    """What TensorFlow draws from is afterwards what it was."""
    return tensorflow_chance.kept()


def seed_chance(seed: int) -> None:
    """Of what draws past Keras."""
    tf.random.set_seed(seed)
