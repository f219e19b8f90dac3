"""The stream door: the data set yields micro-batches, and each step of `fit` pulls a window of them.

The window is pulled whole and trained on in one call, as `steps_per_execution` does with batches, so nothing is left
over between calls: a checkpoint between two steps needs no gradients, and an epoch's last window is just a shorter one.
"""

import functools
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np

from bigbatch.every import Every, Items, planned
from bigbatch.keras import batch
from bigbatch.keras.backends.select import backend
from bigbatch.keras.checkpoint import Checkpoints, updates_of

logger = logging.getLogger("bigbatch.keras")

# Not public: the method that Keras's own fit shows its iterator to, before it counts the steps. An overridden fit, as
# keras-hub's, has made its own data by then. tests/keras/test_private.py fails when it moves.
BUILD = "_maybe_symbolic_build" if keras.backend.backend() == "tensorflow" else "_symbolic_build"


def open_door(model: Any, every: Every, partial: str) -> None:
    """Gives the model a `train_step` for windows, and has `fit` hand it windows."""
    windows = Windows(every, partial)
    model.train_step = backend().stream_step(model)
    plain_fit, plain_train_on_batch = model.fit, model.train_on_batch
    signature = inspect.signature(plain_fit)

    def make_train_function(force: bool = False) -> None:
        if model.train_function is None or force:
            # A new function: `jax.jit` would go on with what it traced of this one before `compile`.
            model.train_step = backend().stream_step(model)
            type(model).make_train_function(model, force=True)
            model.train_function = _pulling(model, windows, model.train_function)

    plain_build, own_fit = getattr(model, BUILD), False  # whether the next iterator is that of a fit that has begun

    def build(iterator: Any = None, data_batch: Any = None) -> None:
        nonlocal own_fit
        plain_build(iterator=iterator, data_batch=data_batch)
        if own_fit and iterator is not None:
            own_fit = False
            _count_windows(iterator, windows)

    def fit(*args: Any, **kwargs: Any) -> Any:
        nonlocal own_fit
        if not model.compiled:
            return plain_fit(*args, **kwargs)  # says so
        given = signature.bind(*args, **kwargs)
        windows.index = updates_of(model)
        with warnings.catch_warnings(), _checkpoints(model, windows, given):
            if not isinstance(every, int):
                # Keras counts on as many steps as there could be windows, and warns when there are fewer.
                warnings.filterwarnings("ignore", message="Your input ran out of data")
            own_fit = True
            try:
                history = plain_fit(*given.args, **given.kwargs)
            finally:
                missed, own_fit = own_fit, False
        if missed:
            raise RuntimeError(
                f"{type(model).__name__}.fit has not called keras.Model.fit, so that nothing was accumulated. "
                "Let it end in super().fit(...)."
            )
        return history

    def train_on_batch(*args: Any, **kwargs: Any) -> Any:
        windows.alone = True
        try:
            return plain_train_on_batch(*args, **kwargs)
        finally:
            windows.alone = False

    fit.__signature__, train_on_batch.__signature__ = signature, inspect.signature(plain_train_on_batch)
    model.make_train_function, model.fit, model.train_on_batch = make_train_function, fit, train_on_batch
    setattr(model, BUILD, build)
    for name in ("save", "save_weights", "load_weights"):
        setattr(model, name, _telling(windows, getattr(model, name)))


def _telling(windows: "Windows", method: Any) -> Any:
    """A method of the model's that says what becomes of the micro-batches that were carried from the last epoch."""
    becomes = {
        "save": "are not in the file: training that goes on from it begins with an empty window",
        "save_weights": "are not in the file: training that goes on from it begins with an empty window",
        "load_weights": "stay: the next window begins with them",
    }[method.__name__]

    @functools.wraps(method)
    def telling(*args: Any, **kwargs: Any) -> Any:
        if windows.held:
            warnings.warn(
                f'model.{method.__name__}: the micro-batches that partial="carry" holds {becomes}. '
                "BackupAndRestore saves and restores them with the weights.",
                stacklevel=2,
            )
        return method(*args, **kwargs)

    return telling


class Windows:
    """Pulls windows from an epoch's micro-batches.

    Attributes:
        index: the index of the next update.
        held: micro-batches that were carried from the last epoch.
        saved: the arrays of such micro-batches, from a checkpoint; the next one that is pulled tells their nesting.
        alone: whether the next micro-batch is a window by itself, as `train_on_batch` hands it.
        left: how many micro-batches the epoch still has, where that is known.
        source: on the PyTorch backend, the iterator that `fit` takes a window's first micro-batch from.
    """

    def __init__(self, every: Every, partial: str):
        self.every, self.partial = every, partial
        self.index = 0
        self.held: list[Any] = []
        self.saved: list[list[Any]] = []
        self.alone = False
        self.left: int | None = None
        self.calls: int | None = None
        self.source: Iterator[Any] = iter(())

    def pull(self, iterator: Iterator[Any]) -> list[Any] | None:
        """The next window, or None where what is left of the epoch makes none.

        Raises:
            StopIteration: nothing is left.
        """
        if self.alone:
            return [next(iterator)]
        plan = planned(self.every, self.index)
        window, self.held = self.held, []
        fresh = self._fill(window, iterator, plan)
        if self.calls is not None:
            self.calls -= 1
        if not fresh:
            self.held = window
            raise StopIteration
        if _is_full(window, plan):
            self.index += 1
            if self.calls == 0 and self.partial == "carry":
                self._fill(self.held, iterator, plan)
                self._say(self.held, plan, "carried to the next epoch")
            return window
        said = {"apply": "applied", "carry": "carried to the next epoch", "drop": "dropped"}[self.partial]
        self._say(window, plan, said)
        if self.partial == "apply":
            self.index += 1
            return window
        if self.partial == "carry":
            self.held = window
        return None

    def _fill(self, window: list[Any], iterator: Iterator[Any], plan: int | Items) -> int:
        """Adds micro-batches until the window is full or the epoch is over, and returns how many."""
        before = len(window)
        while not _is_full(window, plan) and self.left != 0:
            try:
                data = next(iterator)
            except StopIteration:
                break
            saved, self.saved = self.saved, []
            window.extend(_like(data, leaves) for leaves in saved)
            window.append(data)
            if self.left is not None:
                self.left -= 1
        return len(window) - before

    def _say(self, window: list[Any], plan: int | Items, what: str) -> None:
        if window:
            logger.info("The epoch ended in a window: %d micro-batches (every=%s) %s.", len(window), plan, what)


def _like(data: Any, arrays: list[Any]) -> Any:
    """A micro-batch of a checkpoint's arrays, nested as `data` is and on the same device.

    Raises:
        ValueError: they come from other data.
    """
    leaves = batch.leaves(data)
    described = [[(len(x.shape), _dtype(x)) for x in xs] for xs in (arrays, leaves)]
    if described[0] != described[1]:
        raise ValueError(
            "The checkpoint's carried micro-batches come from other data. Received: "
            f"arrays of {_shown(arrays)} in the checkpoint, of {_shown(leaves)} in the data. "
            "Pass the data that the checkpoint was written with, or remove the checkpoint."
        )
    # An array stays one: the framework converts the whole window at once.
    made = [
        x if isinstance(leaf, np.ndarray) else keras.ops.convert_to_tensor(x)
        for x, leaf in zip(arrays, leaves, strict=True)
    ]
    return batch.nest(data, made)


def _dtype(leaf: Any) -> str:
    text = getattr(leaf.dtype, "kind", None) in ("O", "S", "U") or leaf.dtype == "string"
    return "string" if text else keras.backend.standardize_dtype(leaf.dtype)


def _shown(leaves: list[Any]) -> str:
    return ", ".join(f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in leaves) or "none"


def _is_full(window: list[Any], plan: int | Items) -> bool:
    if isinstance(plan, Items):
        return sum(batch.leaves(data)[0].shape[0] for data in window) >= plan.count
    return len(window) >= plan


def _pulling(model: Any, windows: Windows, train_function: Any) -> Any:
    """Keras's own train function for windows, fed from an iterator of micro-batches."""
    torch = keras.backend.backend() == "torch"
    gather = backend().gather
    logs: Any = {}

    def pulling(*args: Any) -> Any:
        nonlocal logs
        *state, data = args  # JAX's comes with the model's state
        # On PyTorch fit has taken the first micro-batch already.
        iterator = itertools.chain(data, () if windows.alone else windows.source) if torch else iter(data)
        pulled = []
        for step in range(model.steps_per_execution):
            try:
                pulled.append(windows.pull(iterator))
            except StopIteration:
                if step == 0:
                    raise
                break
        full = [gather(model, window) for window in pulled if window is not None]
        if not full:
            return (logs, *state) if state else logs
        result = train_function(*state, full if torch else iter(full))
        logs = result[0] if state else result
        return result

    return pulling


def _checkpoints(model: Any, windows: Windows, given: inspect.BoundArguments) -> AbstractContextManager[None]:
    """Those that `fit` is given callbacks for; with one of ours after the user's, unless they are a list of Keras's."""
    arguments, taken = given.arguments, given.signature.parameters
    if "callbacks" not in taken:  # an overridden fit, which hands them on
        rest = next((name for name, p in taken.items() if p.kind is p.VAR_KEYWORD), None)
        arguments = arguments.setdefault(rest, {}) if rest else {}
    callbacks = arguments.get("callbacks")
    checkpoints = Checkpoints(model, windows, callbacks)
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = [] if callbacks is None else keras.tree.flatten(callbacks)
        begin = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: checkpoints.count())
        arguments["callbacks"] = [*callbacks, begin]
    return checkpoints.in_use()


def _count_windows(iterator: Any, windows: Windows) -> None:
    """Has the iterator of a `fit` count its steps in updates."""
    adapter = InWindows(iterator.data_adapter, windows, iterator.steps_per_epoch)
    if iterator.steps_per_epoch is not None:
        iterator.steps_per_epoch = adapter.updates(iterator.steps_per_epoch)
    iterator.data_adapter = adapter


class InWindows:
    """Another adapter's micro-batches, counted in windows."""

    def __init__(self, adapter: Any, windows: Windows, steps: int | None):
        self.adapter, self.windows, self.steps = adapter, windows, steps

    def updates(self, micro_batches: int) -> int:
        """How many windows so many micro-batches make, or, where only the data knows that, at most make."""
        every = self.windows.every
        return -(-micro_batches // every) if isinstance(every, int) else micro_batches

    @property
    def num_batches(self) -> int | None:
        """Steps an epoch: the windows that its micro-batches make, where their number is known."""
        n = self.adapter.num_batches
        if n is None:
            return None
        if self.steps is None:
            return self.updates(n)
        epochs, rest = divmod(n, self.steps)
        return epochs * self.updates(self.steps) + self.updates(rest)

    def on_epoch_begin(self) -> None:
        """Tells the wrapped adapter, and the windows where the epoch is to end."""
        n = self.steps or self.adapter.num_batches
        self.windows.left = n
        self.windows.calls = None if n is None else self.updates(n)
        self.adapter.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Tells the wrapped adapter."""
        self.adapter.on_epoch_end()

    def get_jax_iterator(self) -> Any:
        """The wrapped adapter's micro-batches."""
        return self.adapter.get_jax_iterator()

    def get_torch_dataloader(self) -> Any:
        """The wrapped adapter's micro-batches."""
        return _Sourcing(self.adapter.get_torch_dataloader(), self.windows)


class _Sourcing:
    """A loader whose iterator is kept where the rest of a window can be pulled from."""

    def __init__(self, loader: Any, windows: Windows):
        self.loader, self.windows = loader, windows

    def __iter__(self) -> Iterator[Any]:
        self.windows.source = iter(self.loader)
        return self.windows.source
