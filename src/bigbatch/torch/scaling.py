"""A GradScaler in a window: its losses have one scale, and its sums are unscaled once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from bigbatch.engines.torch_dtypes import is_wide


def check_width(scaler: Any, parameters: list[Tensor], dtype: torch.dtype | None) -> None:
    """Refuses a scaler of gradients that add up in wide sums, outside `.grad`."""
    if scaler is not None and is_wide(parameters, dtype):
        narrowest = min((p.dtype for p in parameters), key=lambda kind: kind.itemsize)
        raise ValueError(
            "scaler unscales gradients that are as wide as the accumulation. "
            f"Received: parameters of {narrowest} and dtype={dtype}. "
            "Keep the parameters in float32 under autocast, or leave the scaler out."
        )


def mark_of(scaler: Any) -> Any:
    """What is the same object until the scaler's next `update()`.

    `unscale_` writes to gradients without a new `_version`, and itself refuses to be called twice. No public name shows
    that `update()` was called: tests/torch/test_private.py.
    """
    return getattr(scaler, "_per_optimizer_states", None)


def check_mark(scaler: Any, mark: Any) -> None:
    """Refuses a scaler that was updated since `mark_of`."""
    if mark is not mark_of(scaler):
        raise RuntimeError(
            "scaler.update() was called inside an open window, whose losses have been multiplied by the scale "
            "from before. Remove it, and unscale_(): the Accumulator calls both once a window, and with "
            "Gradients they follow the window's report. Two "
            "Accumulators need a GradScaler each. The window was dropped; the parameters and the optimizer are "
            "as they were."
        )


@contextmanager
def unscaled(scaler: Any, optimizer: Any, gradients: Sequence[Tensor]) -> Iterator[Any]:
    """Unscales the gradients, and updates the scaler afterwards.

    Yields:
        The scaler, or None: without a gradient it has recorded nothing, and would refuse to go on.
    """
    if scaler is None or not gradients:
        yield None
        return
    scaler.unscale_(optimizer)
    try:
        yield scaler
    finally:
        scaler.update()


def forget(scaler: Any) -> None:
    """Removes what a scaler has recorded of a dropped window, and leaves its scale as it is."""
    if scaler is not None:
        state = scaler.state_dict()
        with suppress(AssertionError, IndexError):  # it has recorded nothing
            scaler.update()
            scaler.load_state_dict(state)
