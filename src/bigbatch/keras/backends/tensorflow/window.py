"""A window on the TensorFlow backend: its sums, over one micro-batch after another.

In a graph it is loops from nothing: tracing a micro-batch beforehand tells which gradients there are and which kinds of
items. Dense layers' weight gradients are then kept as products (see `bigbatch.fused.tensorflow_deferred`) and
multiplied out once for many micro-batches.

Run eagerly, or for XLA, which puts such things together in its own way, the first micro-batch stands before the loop.
Either way its items are the unit that the others are weighed in, so that a window of one is the plain step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras import tree

from bigbatch.fused.tensorflow_conv_layout import with_fast_convolutions
from bigbatch.fused.tensorflow_deferred import FactorBuffer, FactoredGrad, capacity, factored_grad
from bigbatch.fused.tensorflow_lookups import SplitGradient, split_gradient, zeros
from bigbatch.fused.tensorflow_transposes import with_fast_products
from bigbatch.keras import batch, losses, noise
from bigbatch.keras.alone import alone

Take = Callable[[list[Any], Any], "Sums"]


class Run(NamedTuple):
    """Micro-batches that one loop can take."""

    count: Any  # a number, or a tensor where only the graph knows
    pull: Callable[[Any], list[Any]]  # the arrays of the one with this index


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


class Owed(NamedTuple):
    """A sum of gradients of which the last products are not multiplied out."""

    total: tf.Tensor  # of those that are, and of dense ones; a 1×1 zero before any
    product: FactoredGrad

    def to_dense(self) -> tf.Tensor:
        """As a dense tensor."""
        return self.times(tf.ones([], self.total.dtype))

    def times(self, factor: tf.Tensor) -> tf.Tensor:
        """All of it times a scalar, which costs nothing where no total is: the factor then goes into the product."""
        return tf.cond(
            tf.equal(tf.size(self.total), 1),
            lambda: self.product.times(factor),
            lambda: (self.total + self.product.to_dense()) * tf.cast(factor, self.total.dtype),
        )


class Growing(NamedTuple):
    """The same inside a loop, where more products come."""

    total: tf.Tensor
    kept: FactorBuffer

    def multiplied_out(self) -> "Growing":
        """With all that were kept in the total."""

        def total() -> tf.Tensor:
            return self.total + self.kept.concat().to_dense()

        return Growing(tf.cond(self.kept.left.size() > 0, total, lambda: self.total), self.kept.emptied())


class Open(NamedTuple):
    """A window inside a loop, which knows no None: where there is no gradient stands ()."""

    sums: Sums  # with a `Growing` for each `FactoredGrad` of the micro-batches
    unit: tf.Tensor  # shape=(kinds,); 0 until there are items


def add_up(model: Any, like: Any, runs: list[Run]) -> tuple[Sums, list[Any], list[losses.Term]]:
    """Forward and backward of all micro-batches: the sums, what the items are weighed in, and the loss's terms."""
    build(model, batch.nest(like, runs[0].pull(0)))
    described: list[losses.Term] = []
    single = len(runs) == 1 and isinstance(runs[0].count, int) and runs[0].count == 1
    in_loops = not (single or model.run_eagerly or model.jit_compile)
    several = sum(run.count for run in runs) > 1
    by_xla = not (single or model.run_eagerly) and model.jit_compile
    take = micro_step(model, like, described, products=in_loops, several=in_loops and several, by_xla=by_xla)
    none = tf.zeros([0], model._loss_tracker.dtype)
    shapes = [v.shape for v in model.trainable_variables]
    with alone(model, several=not single):
        sums, unit = _in_loops(take, runs, none, shapes) if in_loops else _after_the_first(take, runs, none, single)
    return sums, unit, described


def build(model: Any, data: Any) -> None:
    """Makes the variables that Keras makes when it first sees data: a loop's body may make none."""
    with tf.init_scope():
        model._symbolic_build(data_batch=data)


def _after_the_first(take: Take, runs: list[Run], none: tf.Tensor, single: bool) -> tuple[Sums, list[Any]]:
    sums = take(runs[0].pull(0), none)
    unit = [tf.where(items > 0, items, tf.ones_like(items)) for items in sums.items]

    def add(sums: Sums, leaves: list[Any]) -> Any:
        more = take(leaves, tf.stack(unit))
        return tree.map_structure(lambda a, b: None if a is None else a + b, sums, more)

    start = 1
    for run in [] if single else runs:
        # Only what is there is carried: a loop knows no None.
        held = batch.leaves(sums)

        def body(i: Any, held: list[Any], run: Run = run, sums: Sums = sums) -> tuple[Any, list[Any]]:
            return i + 1, batch.leaves(add(batch.nest(sums, held), run.pull(i)))

        # More iterations at once would hold more than one micro-batch's activations.
        _, held = tf.while_loop(
            lambda i, held, run=run: i < run.count, body, (tf.constant(start), held), parallel_iterations=1
        )
        sums, start = batch.nest(sums, held), 0
    return sums, unit


def _in_loops(take: Take, runs: list[Run], none: tf.Tensor, shapes: list[Any]) -> tuple[Sums, list[Any]]:
    steps = _traced(take, runs, none)
    like = steps[0].get_concrete_function().structured_outputs
    room = capacity(g for several in like.gradients for g in several)
    state = _nothing(like, shapes, none.dtype)
    for step, run in zip(steps, runs, strict=True):
        if room is None or step is not steps[0]:
            state = _loop(step, run, tf.constant(0), run.count, state)
            continue

        def group(start: Any, state: Open, step: Take = step, run: Run = run) -> tuple[Any, Open]:
            state, fresh = _multiplied_out(state)
            all_fit = fresh & (run.count - start <= room.alone)
            stop = tf.where(all_fit, run.count, tf.minimum(start + room.beside_sums, run.count))
            return stop, _loop(step, run, start, stop, state, keep=True)

        state = _while(group, tf.constant(0), run.count, state)

    def owed(g: Any) -> Any:
        return Owed(g.total, g.kept.concat()) if isinstance(g, Growing) else None if _absent(g) else g

    unit = tf.where(state.unit > 0, state.unit, tf.ones_like(state.unit))
    sums = _mapped(owed, state).sums
    return sums._replace(noise=None if _absent(sums.noise) else sums.noise), tf.unstack(unit)


def _traced(take: Take, runs: list[Run], none: tf.Tensor) -> list[Any]:
    """The micro-batch's graph for each run: one for those as long as the first, and one for all others."""
    pulled = [run.pull(0) for run in runs]
    usual = pulled[0][0].shape[0]
    groups = [[p for p in pulled if (p[0].shape[0] == usual) == alike] for alike in (True, False)]

    def trace(several: list[list[Any]], length: int | None) -> Any:
        leaves = [[length, *_common(column)] for column in zip(*several, strict=True)]
        signature = [tf.TensorSpec(shape, x.dtype) for shape, x in zip(leaves, several[0], strict=True)]
        return tf.function(take, input_signature=[signature, tf.TensorSpec([None], none.dtype)], autograph=False)

    steps = [trace(several, length) if several else None for several, length in zip(groups, (usual, None), strict=True)]
    return [steps[0 if p[0].shape[0] == usual else 1] for p in pulled]


def _common(tensors: Any) -> list[int | None]:
    """The dimensions after the first, with None where the tensors differ."""
    return [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*(x.shape[1:] for x in tensors), strict=True)]


def _nothing(like: Sums, shapes: list[Any], dtype: tf.DType) -> Open:
    """A window before its first micro-batch, for variables of these shapes."""

    def zero(g: Any, shape: Any) -> Any:
        if isinstance(g, FactoredGrad):
            return Growing(tf.zeros([1, 1], g.left.dtype), FactorBuffer.empty(None, g))
        return () if g is None else zeros(shape, g.dtype)

    scalars = tf.nest.map_structure(lambda x: tf.zeros(x.shape, x.dtype), _scalars(like))
    sums = scalars._replace(gradients=[list(map(zero, several, shapes)) for several in like.gradients])
    return Open(sums, tf.zeros([len(like.items)], dtype))


def _loop(step: Take, run: Run, start: Any, stop: Any, state: Open, keep: bool = False) -> Open:
    """The run's micro-batches from `start` to `stop`; with `keep`, products are kept as such."""

    def body(i: Any, state: Open) -> tuple[Any, Open]:
        more = step(run.pull(i), state.unit)
        items = tf.stack(more.items)
        unit = tf.where(state.unit > 0, state.unit, tf.where(items > 0, items, tf.ones_like(items)))
        place = i - start if keep else None
        gradients = [
            [_added(g, h, place) for g, h in zip(sums, several, strict=True)]
            for sums, several in zip(state.sums.gradients, more.gradients, strict=True)
        ]
        scalars = tf.nest.map_structure(tf.add, _scalars(state.sums), _scalars(more))
        return i + 1, Open(scalars._replace(gradients=gradients), unit)

    return _while(body, start, stop, state)


def _scalars(sums: Sums) -> Sums:
    """All but the gradients, as a loop has them."""
    return sums._replace(gradients=[], noise=() if sums.noise is None else sums.noise)


def _absent(g: Any) -> bool:
    return isinstance(g, tuple) and not g


def _added(g: Any, h: Any, place: Any) -> Any:
    """The sum of gradients and one more, which goes to a place among the products that are kept, or is multiplied."""
    if h is None:
        return ()
    if isinstance(h, FactoredGrad) and place is not None:
        return g._replace(kept=g.kept.write(place, h))
    if isinstance(h, SplitGradient):
        return h.added_to(g)
    h = h.to_dense() if isinstance(h, FactoredGrad) else h
    return g._replace(total=g.total + h) if isinstance(g, Growing) else g + h


def _multiplied_out(state: Open) -> tuple[Open, Any]:
    """With the products that were kept added to the totals, and whether there were none so far."""
    totals: list[tf.Tensor] = []

    def one(g: Any) -> Any:
        if not isinstance(g, Growing):
            return g
        # One after the other: TensorFlow would multiply all of them out before it adds the first.
        with tf.control_dependencies(totals[-1:]):
            g = g.multiplied_out()
        totals.append(g.total)
        return g

    return _mapped(one, state), tf.equal(tf.size(totals[0]), 1)


def _mapped(work: Callable[[Any], Any], state: Open) -> Open:
    gradients = [[work(g) for g in several] for several in state.sums.gradients]
    return state._replace(sums=state.sums._replace(gradients=gradients))


def _while(body: Callable[..., Any], start: Any, stop: Any, state: Open) -> Open:
    def invariant(g: Any) -> Any:
        if isinstance(g, Growing):
            return Growing(tf.TensorShape([None, None]), FactorBuffer(None, None))  # pyright: ignore[reportArgumentType]
        return () if _absent(g) else g.shape

    shapes = tf.nest.map_structure(lambda x: x.shape, state._replace(sums=_scalars(state.sums)))
    gradients = _mapped(invariant, state).sums.gradients
    invariants = shapes._replace(sums=shapes.sums._replace(gradients=gradients))
    # More iterations at once would hold more than one micro-batch's activations.
    return tf.while_loop(
        lambda i, _: i < stop, body, (start, state), (tf.TensorShape(()), invariants), parallel_iterations=1
    )[1]


def micro_step(
    model: Any,
    like: Any,
    described: list[losses.Term],
    products: bool = False,
    several: Any = False,
    by_xla: bool = False,
) -> Take:
    """A function of one micro-batch's arrays and the unit that returns its sums, and fills `described`.

    With `products`, a gradient that is one of small factors comes as a `FactoredGrad`, and one of a table's few rows as
    `SplitGradient`. Where the window has `several` micro-batches, slow products are turned (see
    `bigbatch.fused.tensorflow_transposes`), or `by_xla` convolutions (`bigbatch.fused.tensorflow_conv_layout`).
    """
    replicas = model.distribute_strategy.num_replicas_in_sync
    variables = [v.value for v in model.trainable_variables]
    noisy = noise.opened(model)

    def take(leaves: list[Any], unit: Any) -> Sums:
        x, y, sample_weight = batch.unpack(batch.nest(like, leaves))
        with tf.GradientTape(persistent=True) as tape:
            y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
            terms = losses.terms(model, x, y, y_pred, sample_weight, replicas, _check_values)
            kinds = losses.kinds(terms)
            scaled = [model.optimizer.scale_loss(value) for value, _ in kinds]
        described[:] = terms
        # The first micro-batch comes without a unit, and weighs 1.
        unit = tf.concat([unit, tf.zeros([len(kinds)], unit.dtype)], 0)
        gradients = []
        for k, (value, (_, items)) in enumerate(zip(scaled, kinds, strict=True)):
            weight = tf.where(unit[k] > 0, tf.math.divide_no_nan(tf.cast(items, unit.dtype), unit[k]), 1)
            found = tape.gradient(value, variables, output_gradients=[tf.cast(weight, value.dtype)])
            gradients.append([_kept_as(g, v.shape, products) for g, v in zip(found, variables, strict=True)])
        graph = tf.compat.v1.get_default_graph()
        gradients = (
            with_fast_convolutions(graph, gradients) if by_xla else with_fast_products(graph, several, gradients)
        )
        losses.update_metrics(model, x, y, y_pred, sample_weight)
        return Sums(
            gradients,
            [tf.cast(items, unit.dtype) for _, items in kinds],
            [tf.stack([term.value * term.items, term.items]) for term in terms],
            losses.length(x),
            noise.part(noisy, dense(gradients, variables), losses.length(x)),
        )

    return take


def _check_values(values: Any, x: Any, compiled: Any, y: Any, y_pred: Any) -> None:
    """`losses.check_values`, also where the graph does not know how many examples there are."""
    if isinstance(losses.length(x), int):
        losses.check_values(values, x, compiled, y, y_pred)
        return
    if all(tensor.shape.rank and tensor.shape[0] is None for tensor in tree.flatten((y, y_pred))):
        # What would the loss make of so many? A trace tells, which computes nothing.
        many = 1009
        specs: Any = tree.map_structure(lambda t: tf.TensorSpec([many, *t.shape[1:]], t.dtype), (y, y_pred))
        asked = tf.function(compiled.call, autograph=False).get_concrete_function(*specs).structured_outputs
        if asked.shape[0] is not None:
            if asked.shape[0] != many:
                raise losses.lost_the_batch(asked, f"say {many}")
            return
    # Only the data can tell. An error in the graph comes before the update.
    tf.debugging.assert_equal(tf.shape(values)[0], losses.length(x), "A loss must return one value an example.")


def dense(gradients: list[list[Any]], variables: list[Any]) -> list[list[Any]]:
    """With a function in the place of each that is not a dense tensor, which returns it as one."""

    def one(g: Any, v: Any) -> Any:
        if isinstance(g, SplitGradient):
            return lambda: g.added_to(zeros(v.shape, g.dtype))
        return g.to_dense if isinstance(g, FactoredGrad | Owed) else g

    return [list(map(one, several, variables)) for several in gradients]


def _kept_as(gradient: Any, shape: tf.TensorShape, products: bool) -> Any:
    """A product or taken apart, where that is wanted and it can be; else dense, and at least float32."""
    if gradient is None:
        return None
    gradient = tf.convert_to_tensor(gradient)
    dtype = keras.backend.result_type(gradient.dtype.name, "float32")
    found = (
        (factored_grad(gradient) or split_gradient(gradient, shape)) if products and gradient.dtype == dtype else None
    )
    return tf.cast(gradient, dtype) if found is None else found
