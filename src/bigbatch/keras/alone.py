"""An open window belongs to the step that opened it: what others do to the model inside it is refused by name.

Others are inside a window where the model's own code is: its `call`, its losses and its metrics, which run for each
micro-batch, or once while the step is compiled. Callbacks and data sets run between windows, and may do as they like.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

DROPPED = "The window is discarded: no parameter and nothing that the optimizer holds was moved by it."
MODEL = ("fit", "train_on_batch", "evaluate", "compile", "load_weights", "set_weights")
# Of the tf.Variable inside a Keras variable as well, which optimizers of TensorFlow write to.
VARIABLE = ("assign", "assign_add", "assign_sub")


@contextlib.contextmanager
def alone(model: Any, several: bool) -> Iterator[None]:
    """While the micro-batches are added up, the methods that would move what they share raise.

    Args:
        model: a compiled model.
        several: whether there is more than one micro-batch. If not, a layer may write to its own weights, as
            SpectralNormalization does: that is the plain step.

    Raises:
        RuntimeError: somebody called one of them, or changed which variables are trainable.
    """
    if getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1) > 1:
        yield  # the replicas' threads take turns here, and would put back each other's
        return
    variables = list(model.trainable_variables)
    shadowed = [(model, "model", MODEL), (model.optimizer, "optimizer", ("apply",))]
    if several:
        for v in variables:
            shadowed += [(v, v.path, VARIABLE)]
            if keras.backend.backend() == "tensorflow":
                shadowed += [(v.value, v.path, VARIABLE)]
    before = []
    try:
        for owner, name, methods in shadowed:
            for method in methods:
                # Past Keras's setattr, which would track it. A method is looked up here first.
                before.append((owner, method, owner.__dict__.get(method)))
                owner.__dict__[method] = _refusing(name, method)
        yield
    except Exception as error:
        _check_same(model, variables, error)  # which may be why
        raise
    finally:
        for owner, method, own in reversed(before):
            owner.__dict__.pop(method, None)
            if own is not None:
                owner.__dict__[method] = own
    _check_same(model, variables)


def _check_same(model: Any, variables: list[Any], error: Exception | None = None) -> None:
    if list(map(id, model.trainable_variables)) != list(map(id, variables)):
        raise RuntimeError(
            "trainable was changed inside an open window, whose gradients are of other variables. "
            f"Change it between two steps, in a callback, and compile the model again. {DROPPED}"
        ) from error


def _refusing(owner: str, method: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            f"{owner}.{method} was called inside an open window, where all micro-batches must meet the same model. "
            "Remove it from the model's call, loss or metrics; a callback can do it between two steps, and what a "
            f"layer keeps belongs into a variable with trainable=False. {DROPPED}"
        )

    return refuse


class Gradients:
    """On PyTorch: whether `.grad` and the parameters are as the window left them after its last backward.

    Args:
        parameters: that the window trains.
        several: whether there is more than one micro-batch, as for `alone`.
    """

    def __init__(self, parameters: list[Any], several: bool):
        self.parameters = parameters
        self.still = parameters if several else []
        self.versions = [p._version for p in self.still]
        self.note()

    def note(self) -> None:
        """The gradients are the window's own as they are."""
        self.own = [(p.grad, None if p.grad is None else p.grad._version) for p in self.parameters]

    def check(self) -> None:
        """Compares, without reading a value.

        Raises:
            RuntimeError: they are not, and it says what was seen.
        """
        if [p._version for p in self.still] != self.versions:
            raise RuntimeError(
                "A parameter was moved by an in-place write inside an open window, as an optimizer's step or a copy_ "
                f"makes one. Remove it from the model's call, loss or metrics. {DROPPED}"
            )
        for p, (own, version) in zip(self.parameters, self.own, strict=True):
            if p.grad is own and (own is None or own._version == version):
                continue
            if p.grad is None:
                seen = "a gradient is gone, as zero_grad() leaves it"
            elif p.grad is not own:
                seen = "there is a gradient that is not the window's, as a backward() leaves it"
            else:
                seen = "a gradient was written to, as backward(), clip_grad_norm_() or zero_grad() do"
            raise RuntimeError(
                f"The gradients of an open window were changed by others: {seen}. Remove it from the model's call, "
                f"loss or metrics; torch.autograd.grad leaves .grad alone. {DROPPED}"
            )
