"""The split API: `fit`'s `batch_size` is the batch, and `train_step` takes it one micro-batch at a time."""

from collections.abc import Callable
from typing import Any, Literal

from bigbatch.keras.backends.select import backend, whole_batch_backend
from bigbatch.keras.plan import AutoMicroBatch, planner


def install(model: Any, micro_batch: int | Literal["auto"], whole: bool = False) -> None:
    """Gives the model a `train_step` of its own; all that `fit` builds around it stays Keras's.

    Args:
        model: the model.
        micro_batch: examples in memory at once.
        whole: whether the loss is computed over the whole batch's outputs.
    """
    if micro_batch == "auto":
        _install_auto(model)
        return
    steps = whole_batch_backend() if whole else backend()
    model.train_step = steps.split_step(model, micro_batch)

    def make_train_function(force: bool = False) -> None:
        if model.train_function is None or force:
            # A new function: `jax.jit` would go on with what it traced of this one before `compile`.
            model.train_step = steps.split_step(model, micro_batch)
            type(model).make_train_function(model, force=True)

    model.make_train_function = make_train_function


def _install_auto(model: Any) -> None:
    """Gives the model a train function that chooses the micro-batch by the shape of each batch."""

    def make_train_function(force: bool = False) -> None:
        if model.train_function is None or force:
            model.train_function = _stepping(model, planner().auto_step(model, AutoMicroBatch()))

    model.make_train_function = make_train_function


def _stepping(model: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """A train function as Keras calls it, from a step on one batch, which stays at hand to be run again."""

    def train_function(*args: Any) -> Any:
        *state, source = args  # JAX's comes with the model's state
        source, result = iter(source), None
        for i in range(model.steps_per_execution):
            try:
                data = next(source)
            except StopIteration:
                if i == 0:
                    raise
                break
            result = step(data, *state)
            state = result[1:] if state else state
        return result

    return train_function
