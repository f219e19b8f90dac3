"""A batch as `fit` hands it over: `(x, y, sample_weight)`, nestings of arrays that share their first dimension."""

from typing import Any

from keras import tree
from keras.utils import unpack_x_y_sample_weight as unpack

from bigbatch import errors

__all__ = ["call", "check", "leaves", "nest", "unpack"]


def leaves(data: Any) -> list[Any]:
    """The arrays of a batch, in Keras's own order, without what is None."""
    return [leaf for leaf in tree.flatten(data) if leaf is not None]


def nest(data: Any, values: list[Any]) -> Any:
    """The nesting of `data` with `values` in the places of its arrays; None stays None."""
    following = iter(values)
    if type(data) is tuple and all(part is None or hasattr(part, "shape") for part in data):
        # The usual case; on PyTorch this runs once a micro-batch, and the general function is slower.
        return tuple(None if part is None else next(following) for part in data)
    return tree.pack_sequence_as(data, [None if leaf is None else next(following) for leaf in tree.flatten(data)])


def call(model: Any, x: Any) -> Any:
    """The model's outputs in training mode."""
    # Not public: `_call_has_training_arg`. tests/keras/test_private.py fails when it moves.
    return model(x, training=True) if model._call_has_training_arg else model(x)


def check(data: Any) -> int | None:
    """Accepts a batch that can be cut, and returns its length, or None where the graph does not know it yet."""
    lengths = []
    for name, part in zip(("x", "y", "sample_weight"), unpack(data), strict=True):
        for path, leaf in tree.flatten_with_path(part):
            if leaf is None:
                continue
            where = f"batch['{name}']" + "".join(f"[{key!r}]" for key in path)
            kind = type(leaf).__name__
            if kind.startswith(("Ragged", "Sparse", "BCOO")) or getattr(leaf, "is_sparse", False):
                raise _not_dense(where, leaf)
            if not hasattr(leaf, "shape") or len(leaf.shape) == 0:
                raise errors.leaf_without_length(where, leaf)
            lengths.append((where, leaf.shape[0]))
    known = [(where, n) for where, n in lengths if n is not None]
    return errors.check_lengths(known) if known or not lengths else None


def _not_dense(where: str, leaf: Any) -> Exception:
    kind = type(leaf).__name__
    fix = "Pad it with to_tensor() and mask the padding" if "Ragged" in kind else "Pass a dense array"
    return TypeError(
        f"A leaf of a batch must be a dense array. Received: {where}, a {kind} of shape {tuple(leaf.shape)}. {fix}: "
        "micro-batches are cut and stacked along their leading dimension."
    )
