"""An open window belongs to the step that opened it: whatever else changes the model inside it is refused by name.

Foreign code runs inside a window where the model's own code does: in its `call`, its losses and its metrics, once a
micro-batch, or once while the step is compiled. Callbacks and data sets run between windows and are not restricted.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

from bigbatch.keras.methods import replaced

DISCARDED = "The window is discarded: it has changed no parameter and nothing that the optimizer holds."
MODEL = ("fit", "train_on_batch", "evaluate", "compile", "load_weights", "set_weights")
# Of the tf.Variable inside a Keras variable as well, which optimizers of TensorFlow write to.
VARIABLE = ("assign", "assign_add", "assign_sub")


@contextlib.contextmanager
def guarded(model: Any, adds_up: bool) -> Iterator[None]:
    """Makes the methods that would change the model raise while the micro-batches are added up.

    Args:
        model: a compiled model.
        adds_up: whether there is more than one micro-batch. With one, a layer may write to its own weights, as
            SpectralNormalization does: that is the plain step.

    Raises:
        RuntimeError: one of the methods was called, or other variables are trainable than before.
    """
    if getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1) > 1:
        yield  # the replicas' threads run this at the same time, and would restore each other's methods
        return
    variables = list(model.trainable_variables)
    shadowed = [(model, "model", MODEL), (model.optimizer, "optimizer", ("apply",))]
    if adds_up:
        for v in variables:
            shadowed += [(v, v.path, VARIABLE)]
            if keras.backend.backend() == "tensorflow":
                shadowed += [(v.value, v.path, VARIABLE)]
    refusing = [(owner, method, _refusing(name, method)) for owner, name, methods in shadowed for method in methods]
    try:
        with replaced(refusing):
            yield
    except Exception as error:
        _check_trainable(model, variables, error)  # which may have caused the error
        raise
    _check_trainable(model, variables)


def _check_trainable(model: Any, variables: list[Any], error: Exception | None = None) -> None:
    if list(map(id, model.trainable_variables)) != list(map(id, variables)):
        raise RuntimeError(
            "trainable was changed inside an open window, whose gradients are of other variables. "
            f"Change it between two steps, in a callback, and compile the model again. {DISCARDED}"
        ) from error


def _refusing(owner: str, method: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{owner}.{method} was called inside an open window, where all micro-batches need the same model. "
            "Remove it from the model's call, loss or metrics; a callback can do it between two steps, and what a "
            f"layer keeps belongs into a variable with trainable=False. {DISCARDED}"
        )

    return refuse
