"""The stream API: the data set yields micro-batches, and each step of `fit` takes a window of them.

The window's micro-batches are read before the step trains on them in one call, as `steps_per_execution` does with
batches. So nothing is left over between calls: a checkpoint between two steps needs no gradients, and an epoch's last
window is only a shorter one.
"""

import functools
import inspect
import itertools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras

from bigbatch.every import Every
from bigbatch.keras.backends.select import backend
from bigbatch.keras.checkpoint import Checkpoints, updates_of
from bigbatch.keras.windows import Windows, count_in_windows

# Not public: the method that Keras's own fit shows its iterator to, before it counts the steps. An overridden fit, as
# keras-hub's, has made its own data by then. tests/keras/test_private.py fails when it moves.
BUILD = "_maybe_symbolic_build" if keras.backend.backend() == "tensorflow" else "_symbolic_build"


def install(model: Any, every: Every, partial: str) -> None:
    """Gives the model a `train_step` for windows, and makes `fit` call it with windows."""
    windows = Windows(every, partial)
    model.train_step = backend().stream_step(model)
    methods = {
        "make_train_function": _make_train_function(model, windows),
        "fit": _fit(model, windows),
        "train_on_batch": _train_on_batch(model, windows),
        BUILD: _build(model, windows),
        **{name: _warning_of_carried(windows, getattr(model, name)) for name in _CARRIED},
    }
    for name, method in methods.items():
        setattr(model, name, method)


def _make_train_function(model: Any, windows: Windows) -> Callable[..., None]:
    def make_train_function(force: bool = False) -> None:
        if model.train_function is None or force:
            # A new function: `jax.jit` would go on with what it traced of this one before `compile`.
            model.train_step = backend().stream_step(model)
            type(model).make_train_function(model, force=True)
            model.train_function = _on_windows(model, windows, model.train_function)

    return make_train_function


def _build(model: Any, windows: Windows) -> Callable[..., None]:
    plain = getattr(model, BUILD)

    def build(iterator: Any = None, data_batch: Any = None) -> None:
        plain(iterator=iterator, data_batch=data_batch)
        if windows.fit_begun and iterator is not None:
            windows.fit_begun = False
            count_in_windows(iterator, windows)

    return build


def _fit(model: Any, windows: Windows) -> Callable[..., Any]:
    plain = model.fit
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def fit(*args: Any, **kwargs: Any) -> Any:
        if not model.compiled:
            return plain(*args, **kwargs)  # Keras raises
        given = signature.bind(*args, **kwargs)
        windows.index = updates_of(model)
        with warnings.catch_warnings(), _checkpoints(model, windows, given):
            if not isinstance(windows.every, int):
                # Keras counts on as many steps as there could be windows, and warns when there are fewer.
                warnings.filterwarnings("ignore", message="Your input ran out of data")
            windows.fit_begun = True
            try:
                history = plain(*given.args, **given.kwargs)
            finally:
                missed, windows.fit_begun = windows.fit_begun, False
        if missed:
            raise RuntimeError(
                f"{type(model).__name__}.fit has not called keras.Model.fit, so that nothing was accumulated. "
                "Let it end in super().fit(...)."
            )
        return history

    return fit


def _train_on_batch(model: Any, windows: Windows) -> Callable[..., Any]:
    plain = model.train_on_batch

    @functools.wraps(plain)
    def train_on_batch(*args: Any, **kwargs: Any) -> Any:
        windows.single = True
        try:
            return plain(*args, **kwargs)
        finally:
            windows.single = False

    return train_on_batch


# What becomes of carried micro-batches in a call of each method.
_CARRIED = {
    "save": "are not in the file: training that goes on from it begins with an empty window",
    "save_weights": "are not in the file: training that goes on from it begins with an empty window",
    "load_weights": "stay: the next window begins with them",
}


def _warning_of_carried(windows: Windows, method: Any) -> Any:
    """A method of the model's that warns of the micro-batches that were carried from the last epoch."""

    @functools.wraps(method)
    def warning(*args: Any, **kwargs: Any) -> Any:
        if windows.carried:
            warnings.warn(
                f'model.{method.__name__}: the micro-batches that partial="carry" holds {_CARRIED[method.__name__]}. '
                "BackupAndRestore saves and restores them with the weights.",
                stacklevel=2,
            )
        return method(*args, **kwargs)

    return warning


def _on_windows(model: Any, windows: Windows, train_function: Any) -> Any:
    """Keras's own train function for windows, fed from an iterator of micro-batches."""
    torch = keras.backend.backend() == "torch"
    gather = backend().gather
    logs: Any = {}

    def on_windows(*args: Any) -> Any:
        nonlocal logs
        *state, data = args  # JAX's comes with the model's state
        # On PyTorch fit has read the first micro-batch already.
        iterator = itertools.chain(data, () if windows.single else windows.source) if torch else iter(data)
        taken = []
        for step in range(model.steps_per_execution):
            try:
                taken.append(windows.next(iterator))
            except StopIteration:
                if step == 0:
                    raise
                break
        full = [gather(model, window) for window in taken if window is not None]
        if not full:
            return (logs, *state) if state else logs
        result = train_function(*state, full if torch else iter(full))
        logs = result[0] if state else result
        return result

    return on_windows


def _checkpoints(model: Any, windows: Windows, given: inspect.BoundArguments) -> AbstractContextManager[None]:
    """The checkpoints of `fit`'s callbacks; one of ours comes after the user's, unless they are a list of Keras's."""
    arguments, parameters = given.arguments, given.signature.parameters
    if "callbacks" not in parameters:  # an overridden fit, which hands them on
        options = next((name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD), None)
        arguments = arguments.setdefault(options, {}) if options else {}
    callbacks = arguments.get("callbacks")
    checkpoints = Checkpoints(model, windows, callbacks)
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = [] if callbacks is None else keras.tree.flatten(callbacks)
        begin = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: checkpoints.count())
        arguments["callbacks"] = [*callbacks, begin]
    return checkpoints.in_use()
