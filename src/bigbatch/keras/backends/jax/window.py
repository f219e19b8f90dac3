"""A window on the JAX backend: one `lax.scan` over its micro-batches, one `optimizer.stateless_apply`.

The scan carries the sums and the state that a forward changes: seeds, moving statistics, metrics. Micro-batches of one
shape make one scan; a shorter last one is a scan of its own. All of it is one compiled function, as in plain `fit`.
`add_runs` is all that exactness needs; it asks `bigbatch.fused.jax` to reach the same sums with less work.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax
from keras import distribution

from bigbatch.keras import batch, losses, noise_window, skipped
from bigbatch.keras.guard import guarded

try:
    from bigbatch.fused import jax as fused
except ModuleNotFoundError:  # the folder was left out, and the plain loop does everything
    fused = None

Step = Callable[[Any, Any], tuple[dict[str, Any], Any]]


class State(NamedTuple):
    """The values of the model's variables, as Keras's JAX trainer passes them."""

    trainable: Any
    non_trainable: Any
    optimizer: Any
    metrics: Any


class Sums(NamedTuple):
    """A window's sums so far, of trees of arrays.

    Attributes:
        gradients: Σ nᵢ·gᵢ / unit, for each kind of items and each trainable variable.
        unit: what each kind's items are divided by: the first micro-batch's items; 0 before it.
        items: Σ nᵢ for each kind.
        losses: Σ nᵢ·lossᵢ and Σ nᵢ for each term of the loss.
        noise: the sum of `noise_window.part`, or None.
    """

    gradients: Any
    unit: Any
    items: Any
    losses: Any
    noise: Any


def split_step(model: Any, micro_batch: int) -> Step:
    """`train_step` for a whole batch."""

    def train_step(state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        return _window(model, State(*state), data, cut(data, micro_batch))

    return train_step


def cut(data: Any, micro_batch: int) -> list[list[Any]]:
    """A batch's micro-batches: those of one shape stacked, and a shorter last one."""
    batch.check(data)
    leaves = batch.leaves(data)
    length = leaves[0].shape[0]
    size = min(micro_batch, length)
    full = length // size
    if distribution.distribution() is None:
        runs = [[leaf[: full * size].reshape(full, size, *leaf.shape[1:]) for leaf in leaves]]
    else:
        # Every micro-batch takes examples from every device; a contiguous one would be moved between them.
        runs = [[leaf[: full * size].reshape(size, full, *leaf.shape[1:]).swapaxes(0, 1) for leaf in leaves]]
    if length % size:
        runs.append([leaf[None, full * size :] for leaf in leaves])
    return runs


def gather(model: Any, window: list[Any]) -> Any:
    """A window's micro-batches as what `stream_step`'s `train_step` takes: those of one shape, stacked.

    The largest come first: a shuffled data set has its short micro-batch anywhere, and each order would be compiled.
    """
    for data in window:
        batch.check(data)

    def shapes(row: list[Any]) -> list[Any]:
        return [leaf.shape for leaf in row]

    runs = []
    for _, alike in itertools.groupby(sorted(map(batch.leaves, window), key=shapes, reverse=True), key=shapes):
        columns = zip(*alike, strict=True)
        stacked = [np.stack(c) if isinstance(c[0], np.ndarray) else jnp.stack(c) for c in columns]
        runs.append(batch.nest(window[0], stacked))
    return runs


def stream_step(model: Any) -> Step:
    """`train_step` for a window, as `gather` makes it."""

    def train_step(state: Any, window: list[Any]) -> tuple[dict[str, Any], Any]:
        return _window(model, State(*state), window[0], [batch.leaves(run) for run in window])

    return train_step


def variable_values(model: Any) -> list[tuple[Any, Any]]:
    """The variables and their values, which `fit` takes out of them while it runs."""
    if model.built and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [(v, v.value) for v in variables]


def restore_values(values: list[tuple[Any, Any]]) -> None:
    """Fills variables that have no value: plain `fit` leaves them so after an error before its first update."""
    for v, value in values:
        # `_value` is not public. tests/keras/test_private.py fails when it moves.
        if v._value is None and not value.is_deleted():
            v.assign(value)


def _window(model: Any, state: State, like: Any, runs: list[list[Any]]) -> tuple[dict[str, Any], Any]:
    """One update from the micro-batches of `runs`: leaves of equal shape, stacked along a new first dimension."""
    terms: list[losses.Term] = []
    examples = sum(run[0].shape[0] * run[0].shape[1] for run in runs)
    sums, non_trainable, metrics = add_up(model, state, like, runs, terms)
    return update(model, terms, examples, state._replace(non_trainable=non_trainable, metrics=metrics), sums)


def add_up(
    model: Any, state: State, like: Any, runs: list[list[Any]], terms: list[losses.Term]
) -> tuple[Sums, Any, Any]:
    """Forward and backward of all micro-batches: the sums, the non-trainable variables and the metrics'.

    Args:
        model: the model.
        state: its values.
        like: the nesting of a micro-batch.
        runs: the micro-batches, as `_window` takes them.
        terms: is filled with the loss's terms.
    """
    single = len(runs) == 1 and len(runs[0][0]) == 1
    first = [leaf[0] for leaf in runs[0]]
    changing = state.non_trainable, state.metrics
    micro_step = _MicroStep(model, like, state, terms)
    with guarded(model, adds_up=not single):
        if single:
            return micro_step(None, first, *changing)  # the plain step, with nothing to add up
        shapes = jax.eval_shape(lambda leaves: micro_step(None, leaves, *changing)[0], first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return add_runs(micro_step, (zeros, *changing), runs)


def add_runs(micro_step: Callable[..., tuple[Sums, Any, Any]], carry: Any, runs: list[list[Any]]) -> Any:
    """The carry, which begins with the sums, after all micro-batches of `runs`."""

    def body(carry: Any, leaves: list[Any]) -> tuple[Any, None]:
        sums, *changing = carry
        more, *changing = micro_step(sums, leaves, *changing)
        return (_added(sums, more), *changing), None

    if fused is not None and fused.applies():
        carry, runs = _fused_run(fused.scan, micro_step, carry, runs[0]), runs[1:]
        body = fused.with_fast_convolutions(body)
    for run in runs:
        carry, _ = lax.scan(body, carry, run)
    return carry


def _added(sums: Sums, more: Sums) -> Sums:
    return jax.tree.map(jnp.add, sums, more)._replace(unit=more.unit)


def _fused_run(
    scan: Callable[..., Any], micro_step: Callable[..., tuple[Sums, Any, Any]], carry: Any, run: list[Any]
) -> Any:
    """The first run by `fused.scan`, which gets the gradients separately from all other sums."""

    def micro(carry: Any, leaves: list[Any]) -> Any:
        sums, *changing = carry
        more, *changing = micro_step(sums, leaves, *changing)
        return (more.gradients, None), (_added(sums, more._replace(gradients=[])), *changing), None

    zeros, *changing = carry
    gradients, (sums, *changing), _ = scan(micro, zeros.gradients, (zeros._replace(gradients=[]), *changing), run)
    return sums._replace(gradients=gradients), *changing


def update(
    model: Any, terms: list[losses.Term], examples: Any, state: State, sums: Sums
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The logs and the model's new values, from those after the micro-batches, and a window's sums and loss terms."""
    terms_are_means, kinds_are_means = losses.are_means(terms)
    means = [
        total / jnp.where(items == 0, 1, items) if is_mean else total
        for (total, items), is_mean in zip(sums.losses, terms_are_means, strict=True)
    ]
    factors = [
        unit / jnp.where(items == 0, 1, items) if is_mean else jnp.ones_like(unit)
        for unit, items, is_mean in zip(sums.unit, sums.items, kinds_are_means, strict=True)
    ]
    noisy = _noise_opened(model, state)
    with keras.StatelessScope(list(zip(model.metrics_variables, state.metrics, strict=True))) as scope:
        loss = losses.report(model, terms, means, examples)
        noise_logs = noise_window.closed(noisy, sums.noise, sums.gradients, factors, examples, loss)
        logs = {**model.get_metrics_result(), **noise_logs}
    metrics = [scope.get_current_value(v) for v in model.metrics_variables]
    counted = skipped.counted(terms, sums.items)

    def apply() -> Any:
        gradients = []
        for v, *parts in zip(state.trainable, *sums.gradients, strict=True):
            weighted = [g * factor.astype(g.dtype) for g, factor in zip(parts, factors, strict=True)]
            gradients.append(functools.reduce(jnp.add, weighted).astype(v.dtype))
        return tuple(map(list, model.optimizer.stateless_apply(state.optimizer, gradients, state.trainable)))

    def skip() -> Any:
        if counted:  # a compiled step that calls back cannot be cached: only where there is a reason to log
            jax.debug.callback(skipped.report, *counted)
        return list(state.trainable), list(state.optimizer)

    goes_on = condition(model, sums, loss, counted)
    trainable, optimizer = apply() if goes_on is None else lax.cond(goes_on, apply, skip)
    return logs, (trainable, state.non_trainable, optimizer, metrics)


def condition(model: Any, sums: Sums, loss: Any, counted: list[Any]) -> Any:
    """Whether the update is made, a scalar; None where it always is."""
    holds = None
    if not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):  # which tests finiteness itself
        # The sums are tested, not the means, so that the division is part of the update's own pass over them.
        holds = jnp.isfinite(loss)
        for g in jax.tree.leaves(sums.gradients):
            holds &= jnp.sum(g - g) == 0  # inf - inf is NaN; one quick pass on a CPU, that makes no array
    if counted:
        has_items = sum(counted[1:], counted[0]) > 0
        holds = has_items if holds is None else holds & has_items
    return holds


def _noise_opened(model: Any, state: State) -> noise_window.Window | None:
    with optimizer_scope(model, state):
        return noise_window.opened(model)


def optimizer_scope(model: Any, state: State) -> keras.StatelessScope:
    """In it the optimizer's variables have the values of `state`."""
    return keras.StatelessScope(list(zip(model.optimizer.variables, state.optimizer, strict=True)))


class _MicroStep:
    """Forward and backward of one micro-batch.

    Args:
        model: the model.
        like: the nesting of a micro-batch.
        state: the model's values; of those that a forward changes each call gets its own.
        terms: is filled with the loss's terms.
    """

    def __init__(self, model: Any, like: Any, state: State, terms: list[losses.Term]):
        self.model, self.like, self.state, self.terms = model, like, state, terms
        self.noise = _noise_opened(model, state)

    def __call__(self, sums: Sums | None, leaves: list[Any], non_trainable: Any, metrics: Any) -> tuple[Sums, Any, Any]:
        """The micro-batch's part of the sums, with the unit of `sums`; the non-trainable variables and the metrics'."""
        data = batch.unpack(batch.nest(self.like, leaves))
        values, back, (items, totals, non_trainable, metrics) = jax.vjp(
            lambda trainable: self._forward(trainable, data, non_trainable, metrics),
            self.state.trainable,
            has_aux=True,
        )
        unit = [jnp.where(n > 0, n, 1) for n in items]
        if sums is not None:
            unit = [jnp.where(old > 0, old, new) for old, new in zip(sums.unit, unit, strict=True)]
        gradients = []
        for k in range(len(values)):
            weights = [
                (items[k] / unit[k]).astype(value.dtype) if j == k else jnp.zeros_like(value)
                for j, value in enumerate(values)
            ]
            gradients.append([g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in back(weights)[0]])
        part = noise_window.part(self.noise, gradients, losses.length(data[0]))
        return Sums(gradients, unit, items, totals, part), non_trainable, metrics

    def _forward(self, trainable: Any, data: Any, non_trainable: Any, metrics: Any) -> tuple[list[Any], Any]:
        """The scaled loss of each kind of items; beside them the items, the terms' sums and the changed variables."""
        (x, y, sample_weight), model = data, self.model
        training = {"training": True} if model._call_has_training_arg else {}
        y_pred, non_trainable, added = model.stateless_call(trainable, non_trainable, x, return_losses=True, **training)
        if added:
            # Where compute_loss finds them, as in Keras's own train_step. Not public: tests/keras/test_private.py.
            model._losses_override = added
        variables = model.trainable_variables, model.non_trainable_variables, model.metrics_variables
        values = trainable, non_trainable, metrics
        mapping = [pair for pairs in zip(variables, values, strict=True) for pair in zip(*pairs, strict=True)]
        with keras.StatelessScope(mapping) as scope:
            forward = losses.Forward(x, y, y_pred, sample_weight)
            self.terms[:] = losses.terms(model, forward)
            model._losses_override = []
            kinds = losses.kinds(self.terms)
            losses.update_metrics(model, forward)
        non_trainable, metrics = ([scope.get_current_value(v) for v in of_kind] for of_kind in variables[1:])
        with optimizer_scope(model, self.state):
            scaled = [model.optimizer.scale_loss(value) for value, _ in kinds]
        totals = [(term.value * term.items, term.items) for term in self.terms]
        return scaled, ([items for _, items in kinds], totals, non_trainable, metrics)
