"""A checkpoint's own description of its window, which is checked before any variable is restored."""

import json
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf


class Seal(tf.train.experimental.PythonState):
    """The counts of the window, and the kind and shape of each sum, beside the variables that hold them.

    TensorFlow restores Python's state before it restores a variable: where `deserialize` raises, nothing has changed.
    """

    def __init__(self, state: Callable[[], dict[str, Any]]):
        self._state = state
        self.sums: list[Any] = []  # of the checkpoint that was read last, for sums that are made later

    def serialize(self) -> str:
        """As JSON. The host waits for the device. Nothing for a SavedModel, which keeps no Python state."""
        return json.dumps(self._state()) if tf.executing_eagerly() else ""

    def deserialize(self, string_value: Any) -> None:
        """Refuses a window that cannot be continued.

        Raises:
            ValueError: names the entry.
        """
        if not string_value:
            self.sums = []
            return
        try:
            saved = json.loads(string_value)
            counts = {name: saved[name] for name in ("index", "micro_batches", "items", "unit", "loss")}
            sums = [(str(kind), list(shape), str(dtype)) for kind, shape, dtype in saved["sums"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The checkpoint's entry _seal is damaged: {type(error).__name__}: {error}. Nothing was restored. "
                "Restore an older checkpoint."
            ) from None
        for name, value in counts.items():
            _check(name, value, pending=counts["micro_batches"])
        made = [(str(kind), list(shape), str(dtype)) for kind, shape, dtype in self._state()["sums"]]
        for i, (ours, theirs) in enumerate(zip(made, sums, strict=False)):
            check_sum(i, theirs, ours)
        self.sums = sums


def _check(name: str, value: Any, pending: Any) -> None:
    whole = name in ("index", "micro_batches")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    wrong = None
    if not number or (whole and not isinstance(value, int)):
        wrong = "a whole number" if whole else "a number"
    elif value < 0 and name != "loss":
        wrong = "at least 0"
    elif pending and name in ("items", "unit") and not (math.isfinite(value) and value > 0):
        wrong = "positive and finite"
    if wrong is not None:
        raise ValueError(
            f"The checkpoint's entry _{name} must be {wrong}. Received: {name}={value!r}. Nothing was restored. "
            "Restore an older checkpoint."
        )


def check_sum(place: int, saved: Any, ours: Any) -> None:
    """Refuses a sum of another kind, shape or dtype."""
    if tuple(saved) != tuple(ours):
        said, expected = (f"{kind} of shape {tuple(shape)}, {dtype}" for kind, shape, dtype in (saved, ours))
        raise ValueError(
            f"The checkpoint's entry _sums/{place} does not fit. Received: {said}, for {expected}. Nothing was "
            "restored. Restore it into the model that it was saved from, with the variables in the same order."
        )
