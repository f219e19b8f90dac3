"""The end of a window at the stream API: when it is full, and the update from it, or the reason for none."""

import functools
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_ordering import after, in_turn
from bigbatch.engines.tensorflow_sparse import Gradient, cast
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.every import Items
from bigbatch.noise import UntilNoise
from bigbatch.tensorflow import distributed
from bigbatch.tensorflow.checks import COUNT, message, require, scales_losses
from bigbatch.tensorflow.noise import Meter, WindowNoise, looked_at, nothing
from bigbatch.tensorflow.state import State, as_one_operation
from bigbatch.tensorflow.update import EMPTY, MADE, MOVED, NOT_FINITE, NOT_ITEMS, OPEN, Update


def close_if_full(state: State, held: tf.Tensor) -> Update:
    """The result of a call after which the window holds so many micro-batches; under a strategy, across replicas."""
    is_full = _is_full(state, held)

    def close_now(held: tf.Tensor) -> Update:
        return close(state, held)

    if not under_xla() or state._distributed:
        work = close_now if state._distributed else as_one_operation(close_now)
        return tf.cond(is_full, lambda: work(held), lambda: report(state, OPEN, held))

    # XLA copies what a conditional's branch leaves as it is, such as all sums, and not what a loop leaves as it is.
    still_open = report(state, OPEN, held)
    parts = {name: part for name, part in still_open._asdict().items() if part is not None}

    def once(full: tf.Tensor, parts: dict[str, Any]) -> tuple[tf.Tensor, dict[str, Any]]:
        update = close_now(held)._asdict()
        return tf.zeros_like(full), {name: update[name] for name in parts}

    _, parts = tf.while_loop(lambda full, _: full, once, (is_full, parts))
    return still_open._replace(**parts)


def report(state: State, outcome: int, held: tf.Tensor) -> Update:
    """An Update for a window that stays as it is.

    On replicas its items and loss are NaN: adding them up would cost a reduction.
    """
    nan = tf.constant(math.nan, COUNT)
    if state._distributed:
        items, loss = nan, nan
    else:
        items = tf.where(held > 0, state._items, 0)
        loss = state._loss * state._unit / state._items
    noise = None if state._meter is None else nothing()
    return Update(state.index, held, items, loss, nan, tf.constant(outcome), noise)


def _is_full(state: State, held: tf.Tensor) -> tf.Tensor:
    every = state.every
    if isinstance(every, UntilNoise):
        full = held >= every.at_most
        look = tf.logical_and(looked_at(every, held), tf.logical_not(full))
        return tf.logical_or(full, tf.cond(look, lambda: _is_enough(state, held), lambda: tf.constant(False)))
    if isinstance(every, Items):
        return tf.convert_to_tensor(state._items) >= tf.constant(every.count, COUNT)
    return held >= (_planned(state, held) if callable(every) else every)


def _planned(state: State, held: tf.Tensor) -> tf.Tensor:
    """What `every` says of this window, where that is a function."""
    planned = state._host.planned(state.index)

    def wrong() -> tf.Tensor:
        text = message(
            lambda: errors.check_every(-1), {"-1": tf.reshape(planned, [-1])[0], "(int)": f"({planned.dtype.name})"}
        )
        # The window keeps what it holds: the function can be corrected.
        with after(state._micro_batches.assign(held, read_value=False)):
            return tf.identity(text)

    with after(require(tf.reduce_all(planned > 0), wrong)):
        return tf.cast(tf.reshape(planned, ()), tf.int64)


def _is_enough(state: State, held: tf.Tensor) -> tf.Tensor:
    """Whether the mean gradient is known well enough, for `until_noise`."""
    means = _means(state, state._unit / state._items)
    meter: Any = state._meter
    norm = tf.cast(tf.linalg.global_norm(means), COUNT)
    now = _noise(state, meter, held, tf.convert_to_tensor(state._items), norm)
    return state.every.is_enough(now.items, now.trace, now.squared_norm)


def _noise(state: State, meter: Meter, held: tf.Tensor, items: tf.Tensor, norm: tf.Tensor) -> WindowNoise:
    """The noise of the window so far, from the norm of its mean gradient."""
    scale = state.optimizer.dynamic_scale if scales_losses(state.optimizer) else 1.0
    return meter.window(held, items, norm, tf.cast(scale, COUNT))


def close(state: State, held: tf.Tensor) -> Update:
    """One update from the window's sums, or none and a reason."""
    moved = _check_undisturbed(state)
    with tf.control_dependencies([moved]):
        if state._distributed:
            whole = distributed.clips(state.optimizer)
            reduced = distributed.reduced(state._sums, state._items, state._loss, whole)
            items, loss, factor, norm, finite, share = reduced
            apply = functools.partial(share, functools.partial(_apply_means, state))
        else:
            items, loss = tf.identity(state._items), tf.identity(state._loss)
            factor = state._unit / state._items
            means = _means(state, factor)
            norm = tf.cast(tf.linalg.global_norm(means), COUNT) if means else tf.zeros((), COUNT)
            finite, apply = tf.math.is_finite(norm), functools.partial(_apply_means, state, means)
        meter = state._meter
        noise = None if meter is None else _noise(state, meter, held, items, norm)
        outcome = _make(state, apply, finite, items, moved)
        if meter is not None and noise is not None:
            noise = meter.close(noise, state.index, tf.equal(outcome, MADE))
        update = Update(state.index, held, items, loss * factor, norm, outcome, noise)
        with tf.control_dependencies([update.index, update.micro_batches]):
            state._index.assign_add(tf.cast(update.made, tf.int64))
        return update


def _check_undisturbed(state: State) -> tf.Tensor:
    """False; an error that empties the window, where others changed its variables. XLA raises none: true."""
    if not state._may_be_disturbed():
        return tf.constant(False)
    moved, text = state._guard.moved(state.optimizer, state._host.variables, state._dense())

    def wrong() -> tf.Tensor:
        with after(state._micro_batches.assign(0, read_value=False)):
            return tf.identity(text())

    with after(require(tf.logical_not(moved), wrong)):
        return tf.identity(moved)


def _make(state: State, apply: Callable[[], None], finite: tf.Tensor, items: tf.Tensor, moved: tf.Tensor) -> tf.Tensor:
    """Makes the update if there is to be one, and returns the outcome."""
    if not state._sums:
        return tf.constant(EMPTY)
    always = state.nonfinite == "apply" or scales_losses(state.optimizer)
    made = tf.where(finite | (state.nonfinite == "apply"), MADE, NOT_FINITE)
    if not under_xla():
        # Bad items, and what others have changed, have raised an error before.
        apply() if always else tf.cond(finite, apply, lambda: None)
        return made
    counted = tf.math.is_finite(items)
    tf.cond(counted & tf.logical_not(moved) & (finite | always), apply, lambda: None)
    return tf.where(moved, MOVED, tf.where(counted, made, NOT_ITEMS))


def _means(state: State, factor: tf.Tensor) -> list[Gradient]:
    return in_turn(lambda one: one.mean(factor), state._sums)


def _apply_means(state: State, means: list[Gradient]) -> None:
    pairs = zip(means, state._host.variables, strict=True)
    state.optimizer.apply_gradients([(cast(g, tf.as_dtype(v.dtype)), v) for g, v in pairs])
