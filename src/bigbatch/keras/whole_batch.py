"""A loss over the whole batch: each micro-batch runs forward, and once more for its gradients.

`fit`'s loss then sees the outputs of all micro-batches together, in the batch's order, as in plain `fit`. What a layer
writes to while it is called, moving averages and the seeds of random numbers, goes into a `StatelessScope`: so the
second run starts from what the first one started from, and the model's variables change once.
"""

from typing import Any, NamedTuple

import keras
from keras import ops, tree

# Not public: the masks on a model's outputs, and the generator that draws where a seed is None.
# tests/keras/test_private.py fails when they move.
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.random import seed_generator

from bigbatch import errors
from bigbatch.keras import batch


class Forward(NamedTuple):
    """One micro-batch's forward pass.

    Attributes:
        y_pred: the model's outputs, nested.
        arrays: the outputs and then their masks, of those that have one.
        added: the losses of `add_loss` and of regularizers, scalars.
        state: what `state_of` variables are now.
        written: which of them have changed.
    """

    y_pred: Any
    arrays: list[Any]
    added: list[Any]
    state: list[Any]
    written: list[int]


def state_of(model: Any) -> list[Any]:
    """The variables that a forward pass may write to."""
    generator = seed_generator.global_seed_generator().state
    return list({id(v): v for v in [*model.non_trainable_variables, generator]}.values())


def forward(model: Any, x: Any, values: list[tuple[Any, Any]], state: list[Any]) -> Forward:
    """The model's outputs in training mode. No variable changes.

    Args:
        model: the model.
        x: a micro-batch's inputs.
        values: variables, each with the value that it has in this run.
        state: those of them of which the new values are returned.
    """
    # In the scope a regularizer gets None for a variable without a value.
    given = {id(v) for v, _ in values}
    own = [(v, v.value) for v in model.trainable_variables if v.regularizer is not None and id(v) not in given]
    with keras.StatelessScope([*values, *own], collect_losses=True) as scope:
        before = [scope.get_current_value(v) for v in state]
        made = called(model, x)
        after = [scope.get_current_value(v) for v in state]
    written = [k for k, (old, new) in enumerate(zip(before, after, strict=True)) if old is not new]
    return made._replace(state=after, written=written)


def called(model: Any, x: Any) -> Forward:
    """The model's outputs in training mode, in whatever scope this is called; without a state."""
    y_pred = batch.call(model, x)
    added = [model._aggregate_additional_loss(loss) for loss in model.losses]
    model._clear_losses()
    outputs = tree.flatten(y_pred)
    masks = [mask for y in outputs if (mask := get_keras_mask(y)) is not None]
    return Forward(y_pred, [*outputs, *masks], added, [], [])


def joined(like: Forward, arrays: list[Any]) -> Any:
    """The whole batch's outputs, nested and masked as one micro-batch's, from its joined arrays."""
    outputs = tree.flatten(like.y_pred)
    masks = iter(arrays[len(outputs) :])
    for y, of_one in zip(arrays, outputs, strict=False):
        if get_keras_mask(of_one) is not None:
            set_keras_mask(y, next(masks))
    return tree.pack_sequence_as(like.y_pred, arrays[: len(outputs)])


def with_mask_of(masked: Any, y: Any) -> Any:
    """An output that has the mask of another."""
    if (mask := get_keras_mask(masked)) is not None:
        set_keras_mask(y, mask)
    return y


def loss_of(model: Any, data: Any, y_pred: Any, added: list[Any]) -> Any:
    """The loss of the whole batch, by the model's own `compute_loss`; `added` are its other losses' means."""
    x, y, sample_weight = batch.unpack(data)
    # Where compute_loss finds them, as in Keras's own train_step on JAX. Not public: tests/keras/test_private.py.
    model._losses_override = added
    try:
        loss = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
    finally:
        model._losses_override = []
    if len(loss.shape) > 0:
        raise errors.loss_not_scalar(loss)
    return loss


def logs_of(model: Any, data: Any, y_pred: Any, loss: Any, examples: Any) -> dict[str, Any]:
    """Updates the metrics with the whole batch, once, and returns the logs."""
    x, y, sample_weight = batch.unpack(data)
    model._loss_tracker.update_state(loss, sample_weight=examples)
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def is_floating(array: Any) -> bool:
    """Whether it has a gradient."""
    return "float" in keras.backend.standardize_dtype(array.dtype)


def part_of(examples: Any, of_all: Any, dtype: Any) -> Any:
    """A micro-batch's part of a mean over all examples."""
    return ops.cast(examples, dtype) / ops.cast(of_all, dtype)
