"""What a framework shows the laws: one thin driver, written as one of its users would write.

An adapter drives one door. `start` is training through bigbatch, `plain` the framework's own training without it:
the big batch in one piece, one bare optimizer step. A law compares the two, or either with the closed form.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from conformance.jobs import MicroBatch, Params, Spec


class Report(Protocol):
    """What a run says of a window. At a split door, `skipped` is set by the adapter where it made no update."""

    micro_batches: int
    items: float
    loss: float
    skipped: Any


class Run(Protocol):
    """One training. Parameters are given and shown as float64 arrays, whatever is inside."""

    def window(self, micro_batches: Sequence[MicroBatch]) -> Report:
        """Makes one update from a full window. A non-finite one makes none and leaves no trace."""
        ...

    def params(self) -> Params: ...

    def held(self) -> list[np.ndarray]:
        """Everything that an update moves besides the parameters: slots, step counts, the schedule's place, the EMA."""
        ...

    def updates(self) -> int:
        """The optimizer's own count of steps, or the schedule's where it keeps none."""
        ...

    def ema(self) -> Params: ...

    def save(self) -> Any:
        """A checkpoint of everything, gone through the framework's own serialization."""
        ...

    def load(self, saved: Any) -> None: ...

    def acts(self) -> dict[str, Callable[[], None]]:
        """What somebody else can do to an open window of this run. A name is a word that the refusal must contain."""
        ...

    def disturb(self, micro_batches: Sequence[MicroBatch], place: int, act: Callable[[], None]) -> Report | None:
        """Makes one whole window, and calls `act` once before its micro-batch number `place` (0: before the window)."""
        ...

    def watch(self, work: Callable[[], Any]) -> tuple[int, int]:
        """Runs `work` and counts (traces and compilations, waits of the host for the device)."""
        ...


class SplitRun(Run, Protocol):
    def gradient(self, micro_batches: Sequence[MicroBatch]) -> dict[str, np.ndarray | None]:
        """The door alone, with no update."""
        ...


class StreamRun(Run, Protocol):
    def feed(self, micro_batch: MicroBatch) -> Report | None: ...

    def flush(self) -> Report | None: ...

    def reset(self) -> None: ...

    @property
    def pending(self) -> int: ...


class Adapter(Protocol):
    """A door of a framework.

    Attributes:
        name: for test ids, such as "torch-stream".
        door: "split" or "stream".
        absent: whether a parameter can have no gradient at all (None), which is not the same as zero.
        half: the name of the 16-bit dtype that "half" stands for: "bfloat16" or "float16".
        refusal: what `feed` raises of a micro-batch without items; None where items are traced into a program, which
            cannot refuse them: they count for nothing.
    """

    name: str
    door: Literal["split", "stream"]
    absent: bool
    half: str
    refusal: type[Exception] | None

    def start(self, spec: Spec) -> Any: ...

    def plain(self, spec: Spec) -> Any: ...

    def mistakes(self) -> dict[str, Callable[[], Any]]:
        """For each mistake in `laws.MESSAGES` that this door's users can make, a call that makes it.

        The calls share a model whose parameters `untouched` shows.
        """
        ...

    def untouched(self) -> Params: ...
