"""The split door: `fit`'s `batch_size` is the batch, and `train_step` takes it one micro-batch at a time."""

from typing import Any, Literal

from bigbatch.keras.backends.select import backend


def open_door(model: Any, micro_batch: int | Literal["auto"]) -> None:
    """Gives the model a `train_step` of its own; all that `fit` builds around it stays Keras's."""
    if micro_batch == "auto":
        from bigbatch.keras.plan import open_door  # which cuts as this door does

        open_door(model)
    else:
        model.train_step = backend().split_step(model, micro_batch)

        def make_train_function(force: bool = False) -> None:
            if model.train_function is None or force:
                # A new function: `jax.jit` would go on with what it traced of this one before `compile`.
                model.train_step = backend().split_step(model, micro_batch)
                type(model).make_train_function(model, force=True)

        model.make_train_function = make_train_function
