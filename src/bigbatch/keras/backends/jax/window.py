"""A window on the JAX backend: one `lax.scan` over its micro-batches, one `optimizer.stateless_apply`.

The scan carries the sums and the state that a forward changes: seeds, moving statistics, metrics. Micro-batches of one
shape make one scan; a shorter last one is a step of its own. All of it is one compiled function, as in plain `fit`.
Gradients of large weights are not made in the first scan (see `bigbatch.fused.jax_deferred`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax import lax
from keras import distribution

from bigbatch.fused import jax_deferred
from bigbatch.fused.jax_conv_layout import with_fast_convolutions
from bigbatch.keras import batch, losses, noise, skips
from bigbatch.keras.alone import alone

Step = Callable[[Any, Any], tuple[dict[str, Any], Any]]


class Sums(NamedTuple):
    """A window's sums so far, of trees of arrays.

    Attributes:
        gradients: Σ nᵢ·gᵢ / unit, for each kind of items and each trainable variable.
        unit: what each kind's items are weighed in: the first micro-batch's; 0 before it.
        items: Σ nᵢ for each kind.
        losses: Σ nᵢ·lossᵢ and Σ nᵢ for each term of the loss.
        noise: the sum of `noise.part`, or None.
    """

    gradients: Any
    unit: Any
    items: Any
    losses: Any
    noise: Any


def split_step(model: Any, micro_batch: int) -> Step:
    """`train_step` for a whole batch."""

    def train_step(state: Any, data: Any) -> tuple[dict[str, Any], Any]:
        return _window(model, state, data, cut(data, micro_batch))

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
        # Every micro-batch takes examples from every device; a contiguous one would have to move.
        runs = [[leaf[: full * size].reshape(size, full, *leaf.shape[1:]).swapaxes(0, 1) for leaf in leaves]]
    if length % size:
        runs.append([leaf[None, full * size :] for leaf in leaves])
    return runs


def gather(model: Any, window: list[Any]) -> Any:
    """A window's micro-batches as what `stream_step`'s `train_step` takes: those of one shape, stacked.

    The largest come first. A shuffled data set has its short micro-batch anywhere, and each order would be compiled.
    """
    for data in window:
        batch.check(data)
    rows = sorted(map(batch.leaves, window), key=lambda row: [leaf.shape for leaf in row], reverse=True)
    shapes = [[leaf.shape for leaf in row] for row in rows]
    starts = [i for i in range(len(rows)) if i == 0 or shapes[i] != shapes[i - 1]]
    runs = []
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        columns = zip(*rows[start:stop], strict=True)
        stacked = [np.stack(c) if isinstance(c[0], np.ndarray) else jnp.stack(c) for c in columns]
        runs.append(batch.nest(window[0], stacked))
    return runs


def stream_step(model: Any) -> Step:
    """`train_step` for a window, as `gather` makes it."""

    def train_step(state: Any, window: list[Any]) -> tuple[dict[str, Any], Any]:
        return _window(model, state, window[0], [batch.leaves(run) for run in window])

    return train_step


def keep(model: Any) -> list[tuple[Any, Any]]:
    """The values that `fit` takes out of the variables while it runs."""
    if model.built and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [(v, v.value) for v in variables]


def give_back(kept: list[tuple[Any, Any]]) -> None:
    """After an error before the first update, which plain `fit` leaves the variables empty by."""
    for v, value in kept:
        if v._value is None and not value.is_deleted():
            v.assign(value)


def _window(model: Any, state: Any, like: Any, runs: list[list[Any]]) -> tuple[dict[str, Any], Any]:
    """One update from the micro-batches of `runs`: leaves of equal shape, stacked along a new first dimension."""
    trainable, _, optimizer_variables, _ = state
    described: list[losses.Term] = []
    examples = sum(run[0].shape[0] * run[0].shape[1] for run in runs)
    found = add_up(model, state, like, runs, described)
    return _update(model, described, examples, trainable, optimizer_variables, *found)


def add_up(
    model: Any, state: Any, like: Any, runs: list[list[Any]], described: list[losses.Term]
) -> tuple[Sums, Any, Any]:
    """Forward and backward of all micro-batches: the sums, the non-trainable variables and the metrics'.

    Args:
        model: the model.
        state: its four lists of values.
        like: the nesting of a micro-batch.
        runs: the micro-batches, as `_window` takes them.
        described: is filled with the loss's terms.
    """
    several = len(runs) > 1 or len(runs[0][0]) > 1
    with alone(model, several):
        return _added_up(model, state, like, runs, described)


def _added_up(
    model: Any, state: Any, like: Any, runs: list[list[Any]], described: list[losses.Term]
) -> tuple[Sums, Any, Any]:
    trainable, non_trainable, optimizer_variables, metrics = state
    micro_step = _micro_step(model, like, trainable, optimizer_variables, described)
    first = [leaf[0] for leaf in runs[0]]
    if len(runs) == 1 and len(runs[0][0]) == 1:
        # The plain step, with nothing to add up.
        return micro_step(None, first, non_trainable, metrics)
    shapes = jax.eval_shape(lambda leaves: micro_step(None, leaves, non_trainable, metrics)[0], first)

    def micro(state: Any, leaves: list[Any]) -> Any:
        held, *rest = state
        more, *rest = micro_step(held, leaves, *rest)
        return (more.gradients, None), (_added(held, more._replace(gradients=[])), *rest), None

    def body(carry: Any, leaves: list[Any]) -> tuple[Any, None]:
        sums, *rest = carry
        more, *rest = micro_step(sums, leaves, *rest)
        return (_added(sums, more), *rest), None

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = nothing._replace(gradients=[]), non_trainable, metrics
    gradients, (sums, *rest), _ = jax_deferred.scan(micro, nothing.gradients, state, runs[0])
    carry = (sums._replace(gradients=gradients), *rest)
    for run in runs[1:]:
        carry, _ = lax.scan(with_fast_convolutions(body), carry, run)
    return carry


def _added(sums: Sums, more: Sums) -> Sums:
    return jax.tree.map(jnp.add, sums, more)._replace(unit=more.unit)


def _update(
    model: Any,
    described: list[losses.Term],
    examples: Any,
    trainable: Any,
    optimizer_variables: Any,
    sums: Sums,
    non_trainable: Any,
    metrics: Any,
) -> tuple[dict[str, Any], Any]:
    terms_divide, kinds_divide = losses.quotients(described)
    means = [
        total / jnp.where(items == 0, 1, items) if divide else total
        for (total, items), divide in zip(sums.losses, terms_divide, strict=True)
    ]
    factors = [
        unit / jnp.where(items == 0, 1, items) if divide else jnp.ones_like(unit)
        for unit, items, divide in zip(sums.unit, sums.items, kinds_divide, strict=True)
    ]
    noisy = _noise_opened(model, optimizer_variables)
    with keras.StatelessScope(list(zip(model.metrics_variables, metrics, strict=True))) as scope:
        total = losses.report(model, described, means, examples)
        noise_logs = noise.closed(noisy, sums.noise, sums.gradients, factors, examples, total)
        logs = {**model.get_metrics_result(), **noise_logs}
    metrics = [scope.get_current_value(v) for v in model.metrics_variables]

    def apply() -> Any:
        gradients = []
        for v, *parts in zip(trainable, *sums.gradients, strict=True):
            weighted = [g * factor.astype(g.dtype) for g, factor in zip(parts, factors, strict=True)]
            gradients.append(functools.reduce(jnp.add, weighted).astype(v.dtype))
        return tuple(map(list, model.optimizer.stateless_apply(optimizer_variables, gradients, trainable)))

    made = None  # whether the update is made, unless it is always
    if not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
        # A window that is not finite has no effect on later ones. Loss scaling asks that itself, and takes note.
        # The sums are asked, so that the division is part of the update's own pass over them.
        made = jnp.isfinite(total)
        for g in jax.tree.leaves(sums.gradients):
            made &= jnp.sum(g - g) == 0  # inf and NaN make NaN of it; one quick pass on a CPU, that makes no array
    counted = skips.counted(described, sums.items)
    if counted:
        some = sum(counted[1:], counted[0]) > 0
        made = some if made is None else made & some

    def skip() -> Any:
        if counted:  # else nothing is said, and the compiled step can be cached, as one that calls back cannot
            jax.debug.callback(skips.say, *counted)
        return list(trainable), list(optimizer_variables)

    updated = apply() if made is None else lax.cond(made, apply, skip)
    trainable, optimizer_variables = updated
    return logs, (trainable, non_trainable, optimizer_variables, metrics)


def _noise_opened(model: Any, optimizer_variables: Any) -> noise.Window | None:
    with keras.StatelessScope(list(zip(model.optimizer.variables, optimizer_variables, strict=True))):
        return noise.opened(model)


def _micro_step(
    model: Any, like: Any, trainable: Any, optimizer_variables: Any, described: list[losses.Term]
) -> Callable[..., tuple[Sums, Any, Any]]:
    noisy = _noise_opened(model, optimizer_variables)

    def forward(trainable: Any, data: Any, non_trainable: Any, metrics: Any) -> tuple[list[Any], Any]:
        x, y, sample_weight = data
        training = {"training": True} if model._call_has_training_arg else {}
        y_pred, non_trainable, added = model.stateless_call(trainable, non_trainable, x, return_losses=True, **training)
        if added:
            model._losses_override = added  # where compute_loss finds them, as in Keras's own train_step
        mapping = [
            *zip(model.trainable_variables, trainable, strict=True),
            *zip(model.non_trainable_variables, non_trainable, strict=True),
            *zip(model.metrics_variables, metrics, strict=True),
        ]
        with keras.StatelessScope(mapping) as scope:
            terms = losses.terms(model, x, y, y_pred, sample_weight)
            model._losses_override = []
            kinds = losses.kinds(terms)
            losses.update_metrics(model, x, y, y_pred, sample_weight)
        non_trainable, metrics = (
            [scope.get_current_value(v) for v in variables]
            for variables in (model.non_trainable_variables, model.metrics_variables)
        )
        described[:] = terms
        with keras.StatelessScope(list(zip(model.optimizer.variables, optimizer_variables, strict=True))):
            scaled = [model.optimizer.scale_loss(value) for value, _ in kinds]
        sums = [(term.value * term.items, term.items) for term in terms]
        return scaled, ([items for _, items in kinds], sums, non_trainable, metrics)

    def micro_step(sums: Sums | None, leaves: list[Any], non_trainable: Any, metrics: Any) -> tuple[Sums, Any, Any]:
        data = batch.unpack(batch.nest(like, leaves))
        values, back, (items, totals, non_trainable, metrics) = jax.vjp(
            lambda trainable: forward(trainable, data, non_trainable, metrics), trainable, has_aux=True
        )
        unit = [jnp.where(n > 0, n, 1) for n in items]
        if sums is not None:
            unit = [jnp.where(kept > 0, kept, new) for kept, new in zip(sums.unit, unit, strict=True)]
        gradients = []
        for k in range(len(values)):
            weights = [
                (items[k] / unit[k]).astype(value.dtype) if j == k else jnp.zeros_like(value)
                for j, value in enumerate(values)
            ]
            gradients.append([g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in back(weights)[0]])
        part = noise.part(noisy, gradients, losses.length(data[0]))
        return Sums(gradients, unit, items, totals, part), non_trainable, metrics

    return micro_step
