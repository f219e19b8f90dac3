"""A stream's windows: which micro-batches each holds, and how many there are in an epoch."""

import logging
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from bigbatch.every import Every, Items, planned
from bigbatch.keras import batch

logger = logging.getLogger("bigbatch.keras")


class Windows:
    """Takes windows from an epoch's micro-batches.

    Attributes:
        index: the index of the next update.
        carried: micro-batches that were carried from the last epoch.
        saved: the arrays of such micro-batches, from a checkpoint; the next micro-batch has their nesting.
        single: whether the next micro-batch is a window by itself, as `train_on_batch` passes it.
        fit_begun: whether the next iterator that Keras builds the model from is that of a `fit` that has begun.
        left: how many micro-batches the epoch still has, where that is known.
        calls: how many windows the epoch still has, where that is known.
        source: on the PyTorch backend, the iterator that `fit` takes a window's first micro-batch from.
    """

    def __init__(self, every: Every, partial: str):
        self.every, self.partial = every, partial
        self.index = 0
        self.carried: list[Any] = []
        self.saved: list[list[Any]] = []
        self.single = self.fit_begun = False
        self.left: int | None = None
        self.calls: int | None = None
        self.source: Iterator[Any] = iter(())

    def next(self, iterator: Iterator[Any]) -> list[Any] | None:
        """The next window, or None where the epoch's last micro-batches make none.

        Raises:
            StopIteration: nothing is left.
        """
        if self.single:
            return [next(iterator)]
        plan = planned(self.every, self.index)
        window, self.carried = self.carried, []
        fresh = self._fill(window, iterator, plan)
        if self.calls is not None:
            self.calls -= 1
        if not fresh:
            self.carried = window
            raise StopIteration
        if _is_full(window, plan):
            self.index += 1
            if self.calls == 0 and self.partial == "carry":
                self._fill(self.carried, iterator, plan)
                self._log(self.carried, plan)
            return window
        self._log(window, plan)
        if self.partial == "apply":
            self.index += 1
            return window
        if self.partial == "carry":
            self.carried = window
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

    def _log(self, window: list[Any], plan: int | Items) -> None:
        if window:
            ended = {"apply": "applied", "carry": "carried to the next epoch", "drop": "dropped"}[self.partial]
            logger.info("The epoch ended in a window: %d micro-batches (every=%s) %s.", len(window), plan, ended)


def _like(data: Any, arrays: list[Any]) -> Any:
    """A micro-batch of a checkpoint's arrays, nested as `data` is and on the same device.

    Raises:
        ValueError: they come from other data.
    """
    leaves = batch.leaves(data)
    saved, own = ([(len(x.shape), _dtype(x)) for x in xs] for xs in (arrays, leaves))
    if saved != own:
        raise ValueError(
            "The checkpoint's carried micro-batches come from other data. Received: "
            f"arrays of {_shown(arrays)} in the checkpoint, of {_shown(leaves)} in the data. "
            "Pass the data that the checkpoint was written with, or remove the checkpoint."
        )
    # An array stays one: the framework converts the whole window at once.
    values = [
        x if isinstance(leaf, np.ndarray) else keras.ops.convert_to_tensor(x)
        for x, leaf in zip(arrays, leaves, strict=True)
    ]
    return batch.nest(data, values)


def _dtype(leaf: Any) -> str:
    text = getattr(leaf.dtype, "kind", None) in ("O", "S", "U") or leaf.dtype == "string"
    return "string" if text else keras.backend.standardize_dtype(leaf.dtype)


def _shown(leaves: list[Any]) -> str:
    return ", ".join(f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in leaves) or "none"


def _is_full(window: list[Any], plan: int | Items) -> bool:
    if isinstance(plan, Items):
        return sum(batch.leaves(data)[0].shape[0] for data in window) >= plan.count
    return len(window) >= plan


def count_in_windows(iterator: Any, windows: Windows) -> None:
    """Makes the iterator of a `fit` count its steps in updates."""
    adapter = InWindows(iterator.data_adapter, windows, iterator.steps_per_epoch)
    if iterator.steps_per_epoch is not None:
        iterator.steps_per_epoch = adapter.updates(iterator.steps_per_epoch)
    iterator.data_adapter = adapter


class InWindows:
    """Another data adapter's micro-batches, counted in windows."""

    def __init__(self, adapter: Any, windows: Windows, steps: int | None):
        self.adapter, self.windows, self.steps = adapter, windows, steps

    def updates(self, micro_batches: int) -> int:
        """How many windows this many micro-batches make, or, where only the data determines that, make at most."""
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
        epochs, remainder = divmod(n, self.steps)
        return epochs * self.updates(self.steps) + self.updates(remainder)

    def on_epoch_begin(self) -> None:
        """Sets where the epoch ends, and calls the wrapped adapter."""
        n = self.steps or self.adapter.num_batches
        self.windows.left = n
        self.windows.calls = None if n is None else self.updates(n)
        self.adapter.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Calls the wrapped adapter."""
        self.adapter.on_epoch_end()

    def get_jax_iterator(self) -> Any:
        """The wrapped adapter's micro-batches."""
        return self.adapter.get_jax_iterator()

    def get_torch_dataloader(self) -> Any:
        """The wrapped adapter's micro-batches."""
        return _KeepingItsIterator(self.adapter.get_torch_dataloader(), self.windows)


class _KeepingItsIterator:
    """A loader whose iterator the windows keep, to take the rest of each window from."""

    def __init__(self, loader: Any, windows: Windows):
        self.loader, self.windows = loader, windows

    def __iter__(self) -> Iterator[Any]:
        self.windows.source = iter(self.loader)
        return self.windows.source
