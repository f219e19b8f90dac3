"""A nested batch: its length, and slices of it."""

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import tensorflow as tf

from bigbatch import errors
from bigbatch.tensorflow.checks import message, require


def tensors(batch: Any) -> Any:
    """The same nesting of tensors, and of None; a list of text becomes a tensor of strings, one entry an example."""
    return tf.nest.map_structure(lambda leaf: leaf if leaf is None else tf.convert_to_tensor(leaf), with_text(batch))


def with_text(batch: Any) -> Any:
    """With lists of text as tensors, which `tf.nest` would open."""
    if isinstance(batch, MutableMapping):
        made = copy.copy(batch)
        made.update((key, with_text(value)) for key, value in batch.items())
        return made
    if not isinstance(batch, list | tuple):
        return batch
    if batch and all(isinstance(entry, str | bytes) for entry in batch):
        return tf.constant(list(batch))
    parts = map(with_text, batch)
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)


def length_of(batch: Any) -> Any:
    """The leading dimension: a number where the graph knows it, else a tensor that is checked when the graph runs."""
    leaves = leaves_of(batch, "batch")
    for where, leaf in leaves:
        if leaf.shape.rank == 0:
            raise errors.leaf_without_length(where, leaf)
    known = [(where, n) for where, leaf in leaves if leaf.shape.rank and (n := leaf.shape[0]) is not None]
    if known or not leaves:
        errors.check_lengths(known)
    if len(known) == len(leaves):
        return known[0][1]
    lengths = [(where, tf.shape(leaf)[0]) for where, leaf in leaves]
    first, length = lengths[0]
    checks = [require(length > 0, lambda: message(lambda: errors.check_lengths([(first, 0)])))]
    for where, other in lengths[1:]:
        checks.append(
            require(
                tf.equal(other, length),
                lambda where=where, other=other: message(
                    lambda: errors.check_lengths([(first, 111), (where, 222)]), {"111": length, "222": other}
                ),
            )
        )
    with tf.control_dependencies(checks):
        return tf.identity(length)


def leaves_of(batch: Any, where: str) -> list[tuple[str, tf.Tensor]]:
    """Every tensor of a batch, with the place where it stands."""
    if tf.is_tensor(batch):
        return [(where, batch)]
    leaves = []
    if isinstance(batch, Mapping):
        for key in sorted(batch):
            leaves += leaves_of(batch[key], f"{where}[{key!r}]")
    elif isinstance(batch, tuple) and (fields := getattr(batch, "_fields", None)):
        for key in fields:
            leaves += leaves_of(getattr(batch, key), f"{where}.{key}")
    elif isinstance(batch, list | tuple):
        for key, child in enumerate(batch):
            leaves += leaves_of(child, f"{where}[{key}]")
    else:  # what else tf.nest opens, or None
        leaves += [(where, leaf) for leaf in tf.nest.flatten(batch) if leaf is not None]
    return leaves


def spec_of(leaf: tf.Tensor, length: int) -> tf.TensorSpec:
    """Of a leaf cut to `length` examples."""
    return tf.TensorSpec(tf.TensorShape([length]).concatenate(leaf.shape[1:]), leaf.dtype)


def slice_of(batch: Any, start: Any, size: Any) -> Any:
    """The same nesting with every tensor cut to `size` examples from `start` on."""

    def cut(leaf: tf.Tensor | None) -> tf.Tensor | None:
        if leaf is None:
            return None
        rest = tf.shape(leaf)[1:]
        part = tf.slice(leaf, tf.concat([[start], tf.zeros_like(rest)], 0), tf.concat([[size], rest], 0))
        known = size if isinstance(size, int) else None
        return tf.ensure_shape(part, tf.TensorShape([known]).concatenate(leaf.shape[1:]))

    return tf.nest.map_structure(cut, batch)
