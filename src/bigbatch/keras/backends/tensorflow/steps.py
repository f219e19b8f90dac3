"""The steps of the TensorFlow backend: how the split and the stream API hand a window its micro-batches."""

import itertools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from keras import ops

from bigbatch.keras import batch, losses
from bigbatch.keras.backends.tensorflow.update import update
from bigbatch.keras.backends.tensorflow.window import Run, add_up


def split_step(
    model: Any, micro_batch: int, window: Callable[..., Any] | None = None, *, begins: bool = False
) -> Callable[[Any], Any]:
    """`train_step` for a whole batch. It returns what `window` makes of the micro-batches: by default, an update.

    `begins` is for a window that begins with the first run's first micro-batch, which must be there, however short.
    """
    window = window or _updated

    def train_step(data: Any) -> Any:
        static = batch.check(data)
        leaves = [tf.convert_to_tensor(leaf) for leaf in batch.leaves(data)]
        length = losses.length(leaves)
        # XLA needs static shapes, as factored gradients do: full micro-batches, then the shorter last one.
        size = min(micro_batch, micro_batch if static is None else static)
        if static is None and (model.jit_compile or begins):
            size = tf.minimum(micro_batch, length)
        full = length // size

        def fixed(i: Any) -> list[Any]:
            shapes: list[Any] = [ops.shape(x) for x in leaves]
            starts = [[i * size] + [0] * (len(shape) - 1) for shape in shapes]
            return [tf.slice(x, at, [size, *shape[1:]]) for x, at, shape in zip(leaves, starts, shapes, strict=True)]

        def last(i: Any) -> list[Any]:
            return [leaf[full * size :] for leaf in leaves]

        runs = [Run(full, fixed), Run(1, last)]
        if static is not None:
            return window(model, data, runs if length % size else runs[:1])
        if not model.jit_compile:
            return window(model, data, [runs[0], Run(tf.cast(length % size > 0, tf.int32), last)])
        return tf.cond(length % size > 0, lambda: window(model, data, runs), lambda: window(model, data, runs[:1]))

    return train_step


def gather(model: Any, window: list[Any]) -> Any:
    """A window's micro-batches as what `stream_step`'s `train_step` takes: few tensors, however many there are."""
    # Not public: `_flatten_layers`. tests/keras/test_private.py fails when it moves.
    in_order = any(getattr(layer, "stateful", False) for layer in model._flatten_layers())
    return model.distribute_strategy.run(_gather, args=(window, bool(model.jit_compile), in_order))


def _gather(window: list[Any], fixed: bool, in_order: bool) -> list[Any]:
    """Runs of micro-batches: (nesting, lengths of the micro-batches), joined along the examples.

    A new run starts where another dimension than the first changes; the largest come first, as each order would be
    traced. Those of a run's usual length are stacked along a new first dimension in a run of their own, without
    lengths. With `fixed`, for XLA, all are, and a new run starts at another length too.
    """
    one_replica = tf.distribute.get_strategy().num_replicas_in_sync == 1
    if one_replica:  # else a short micro-batch leaves some replicas without an example
        for data in window:
            batch.check(data)
    rows = [[tf.convert_to_tensor(leaf) for leaf in batch.leaves(data)] for data in window]

    def shape(row: list[Any]) -> list[tuple[int, ...]]:
        return [tuple(x.shape if fixed else x.shape[1:]) for x in row]

    if not in_order:  # a stateful layer's state goes from one to the next
        rows.sort(key=shape, reverse=True)
    runs: list[Any] = []
    for _, group in itertools.groupby(rows, key=shape):
        alike = list(group)
        sizes: list[Any] = [row[0].shape[0] for row in alike]
        full = [row for row, size in zip(alike, sizes, strict=True) if size == max(sizes)]
        # Replicas must have one nesting, whatever lengths each has; and so must windows in which all lengths differ.
        if not fixed and (not one_replica or 2 * len(full) <= len(alike)):
            full = []
        others = [row for row, size in zip(alike, sizes, strict=True) if not full or size != max(sizes)]
        if full:
            runs.append((_joined(window[0], full, tf.stack), None))
        if others:
            lengths: Any = [row[0].shape[0] for row in others]
            runs.append((_joined(window[0], others, lambda column: tf.concat(column, 0)), tf.constant(lengths)))
    return sorted(runs, key=lambda run: run[1] is not None)


def _joined(like: Any, rows: list[Any], join: Callable[[Any], tf.Tensor]) -> Any:
    return batch.nest(like, [join(column) for column in zip(*rows, strict=True)])


def stream_step(model: Any) -> Callable[[Any], dict[str, Any]]:
    """`train_step` for a window, as `gather` makes it."""

    def train_step(window: list[Any]) -> dict[str, Any]:
        return _updated(model, window[0][0], [_run(*run) for run in window])

    return train_step


def _run(data: Any, lengths: Any) -> Run:
    leaves = batch.leaves(data)
    if lengths is None:
        return Run(losses.length(leaves), lambda i: [leaf[i] for leaf in leaves])
    stops = tf.cumsum(lengths)
    return Run(tf.size(lengths), lambda i: [leaf[stops[i] - lengths[i] : stops[i]] for leaf in leaves])


def _updated(model: Any, like: Any, runs: list[Run]) -> dict[str, Any]:
    """One update from the micro-batches of `runs`."""
    return update(model, *add_up(model, like, runs))
