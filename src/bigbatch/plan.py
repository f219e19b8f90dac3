"""The micro-batch for a memory budget: what may be used, and the search for what fits. No framework is known here.

Memory is neither linear in the micro-batch nor monotone: kernels choose workspaces by size, and compilers fuse
otherwise. So the search proposes a size from what it has seen, and what it returns was itself predicted to fit.
"""

import logging
import math
import numbers
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bigbatch import errors, report
from bigbatch.host import Memory, format_bytes

Result = TypeVar("Result")

RESERVE = 0.1
"""The part of the free memory that is left alone where a package has no reason for another: allocators round up."""

NEVER = 1 << 62
"""What a size needs at which the model does not run at all, as BatchNorm does not on a single example."""

UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**k for k, p in enumerate("KMGT", 1)}} | {
    f"{p}iB": 1024**k for k, p in enumerate("KMGT", 1)
}


class Budget(NamedTuple):
    """What may be in use at once: what is already, and what a micro-batch may take beside it.

    Attributes:
        in_use: bytes that the process (or, on a device of its own, the framework) had in use when it was asked.
        headroom: bytes that may be taken beside that.
        source: where the two come from, as a phrase.
    """

    in_use: int
    headroom: int
    source: str


def budget(memory: Any, device: Memory, *, keep: int = 0, reserve: float = RESERVE) -> Budget:
    """What `memory` comes to on a device.

    Args:
        memory: a size ("8GiB", "500MB", or bytes as an integer) that everything held together may reach; a fraction
            (0 < float ≤ 1) of what is free; or None for what is free less the reserve.
        device: what is in use and free there now.
        keep: bytes to leave for what an optimizer has not made yet.
        reserve: the part of what is free that is left alone by default.

    Raises:
        TypeError, ValueError: `memory` is none of these, or more than there is.
    """
    in_use, headroom, source = _allowed(memory, device, reserve)
    if keep:
        source += f", {format_bytes(keep)} kept for the optimizer's state"
    return Budget(in_use, max(0, headroom - keep), source)


def _allowed(memory: Any, device: Memory, reserve: float) -> tuple[int, int, str]:
    fix = "Pass a size such as '8GiB' or a number of bytes, or a fraction of what is free such as 0.5."
    free = f"{format_bytes(device.free)} free by {device.limit}"
    if memory is None:
        return device.in_use, int(device.free * (1 - reserve)), f"{free}, less a reserve of {reserve:.0%}"
    if isinstance(memory, bool) or not isinstance(memory, str | numbers.Real):
        raise TypeError(f"memory must be a size or a fraction. {errors.received('memory', memory)} {fix}")
    if isinstance(memory, str):
        size = _parsed(memory, fix)
    elif isinstance(memory, numbers.Integral):
        size = int(memory)
    elif 0 < float(memory) <= 1:
        return device.in_use, int(device.free * float(memory)), f"{memory:.0%} of {free}"
    else:
        raise ValueError(f"memory must be a fraction above 0 and up to 1. {errors.received('memory', memory)} {fix}")
    if size <= 0:
        raise ValueError(f"memory must be positive. {errors.received('memory', memory)} {fix}")
    if size > device.in_use + device.free:
        raise ValueError(
            f"memory must not be more than there is. {errors.received('memory', memory)} "
            f"There are {format_bytes(device.in_use)} in use and {free}."
        )
    return device.in_use, size - device.in_use, f"memory={memory!r}, with {format_bytes(device.in_use)} in use"


def _parsed(memory: str, fix: str) -> int:
    found = re.fullmatch(r"\s*([+-]?\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", memory)
    if found is None or found[2] not in UNITS:
        raise ValueError(f"memory must be a size or a fraction. {errors.received('memory', memory)} {fix}")
    return math.floor(float(found[1]) * UNITS[found[2]])


class Candidate(NamedTuple):
    """One size of micro-batch.

    Attributes:
        micro_batch: examples.
        needs: bytes that a window of such micro-batches is predicted to take beside what is held already.
        seconds: of one forward and backward, or None where it was not timed.
    """

    micro_batch: int
    needs: int
    seconds: float | None = None

    @property
    def seconds_per_example(self) -> float:
        """To compare sizes by; infinite where it was not timed."""
        return math.inf if self.seconds is None else self.seconds / self.micro_batch


@dataclass(frozen=True)
class Plan:
    """Which micro-batch to use, and why.

    Attributes:
        micro_batch: the one to use: of those that fit the fastest where they were timed, else the largest.
        batch: examples in the batch.
        candidates: the sizes that were looked at, smallest first.
        budget: what may be held.
        how: where the predictions come from.
        notes: what to know about them.
    """

    micro_batch: int
    batch: int
    candidates: tuple[Candidate, ...]
    budget: Budget
    how: str
    notes: tuple[str, ...] = ()

    @property
    def largest(self) -> int:
        """The largest micro-batch that was found to fit."""
        return max(c.micro_batch for c in self.candidates if self.fits(c))

    @property
    def needs(self) -> int:
        """Bytes that the micro-batch to use takes beside what is held already."""
        return next(c.needs for c in self.candidates if c.micro_batch == self.micro_batch)

    def fits(self, candidate: Candidate) -> bool:
        """Whether a size is within the budget."""
        return candidate.needs <= self.budget.headroom

    def __str__(self) -> str:
        count = -(-self.batch // self.micro_batch)
        return (
            f"micro_batch {self.micro_batch:,} of a batch of {self.batch:,} ({count:,} micro-batch"
            f"{'es' if count > 1 else ''}) needs {format_bytes(self.needs)} of {format_bytes(self.budget.headroom)} "
            f"({self.budget.source}), {self.how}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """A row for each size that was looked at, smallest first, for a table or a data frame.

        Its keys are `micro_batch`, `passes`, `needs` (bytes, None where the size does not run), `share` of the budget,
        `seconds_per_example` (None where it was not timed), `fits`, `chosen` and `verdict`.
        """
        timed = any(c.seconds is not None for c in self.candidates)

        def verdict(c: Candidate) -> str:
            if not self.fits(c):
                return "does not run" if c.needs == NEVER else "too large"
            fastest = timed and c.micro_batch == self.micro_batch
            return ", ".join(["largest"] * (c.micro_batch == self.largest) + ["fastest"] * fastest)

        return [
            {
                "micro_batch": c.micro_batch,
                "passes": -(-self.batch // c.micro_batch),
                "needs": None if c.needs == NEVER else c.needs,
                "share": c.needs / self.budget.headroom if self.budget.headroom and c.needs != NEVER else None,
                "seconds_per_example": None if c.seconds is None else c.seconds_per_example,
                "fits": self.fits(c),
                "chosen": c.micro_batch == self.micro_batch,
                "verdict": verdict(c),
            }
            for c in self.candidates
        ]

    def show(self) -> None:
        """Prints the reasoning as a table. Needs `rich` (`pip install 'bigbatch[demo]'`)."""
        report.print_table(
            f"For a batch of {self.batch:,} a micro-batch may take {format_bytes(self.budget.headroom)} beside the "
            f"{format_bytes(self.budget.in_use)} in use ({self.budget.source}).",
            report.plan_table(self.rows()),
            f"Needs: {self.how}. {' '.join(self.notes)}",
            f"[bold]micro_batch={self.micro_batch}[/bold]",
        )

    def save(self, path: str | Path) -> None:
        """Saves a figure of memory, and time where there is some, against the micro-batch. Needs `matplotlib`."""
        report.plan_figure(self.rows(), self.budget.headroom, f"A batch of {self.batch:,}, {self.how}", path)


def sizes(batch: int) -> list[int]:
    """The micro-batches worth looking at, smallest first: for each number of micro-batches the smallest that does.

    4,096 examples in 5 passes want 820 each; from 821 to 1,023 would be 5 passes too, with more memory.
    """
    return sorted({-(-batch // count) for count in _counts(batch)})


def _counts(batch: int) -> Iterator[int]:
    """Numbers of micro-batches, one for each size they lead to."""
    count = 1
    while count <= batch:
        yield count
        size = -(-batch // count)
        # The next count that makes them smaller.
        count = batch + 1 if size == 1 else max(count + 1, -(-batch // (size - 1)))


def choose(
    needs: Callable[[int], int],
    batch: int,
    budget: Budget,
    how: Callable[[], str],
    *,
    tries: int = 12,
    enough: float = math.inf,
    notes: tuple[str, ...] = (),
    given: Any = None,
    known: dict[int, int] | None = None,
) -> Plan:
    """The largest micro-batch that fits, found by few predictions.

    Proposes by a straight line through the nearest size that fits and the nearest that does not, and by halves where
    the line helps little; then predicts what it proposed. It ends where the next larger size does not fit.

    Args:
        needs: predicts the bytes that a size takes. Dear: a run on fake tensors, or a compilation.
        batch: examples in the batch.
        budget: what may be held.
        how: says where the predictions came from; asked when they have been made.
        tries: how many predictions at most to find a size that fits, and how many more to find the largest.
        enough: the part of the headroom from which on a size is large enough; by default only the largest is.
        notes: for the plan.
        given: what the user gave as `memory`, for the error.
        known: predictions made before; those made now are added to it.

    Raises:
        ValueError: no size fits the `memory` that was given.
        MemoryError: no size fits what is free.
    """
    known = {} if known is None else known
    ladder = sizes(batch)

    def fits(i: int) -> bool:
        size = ladder[i]
        if size not in known:
            known[size] = needs(size)
        return known[size] <= budget.headroom

    found = _climb(fits, ladder, known, budget.headroom, tries, enough)
    if found is None:
        raise nothing_fits(known, budget, given)
    candidates = tuple(Candidate(size, known[size]) for size in sorted(known) if size in ladder)
    return Plan(ladder[found], batch, candidates, budget, how(), notes)


def _climb(
    fits: Callable[[int], bool], ladder: list[int], known: dict[int, int], headroom: int, tries: int, enough: float
) -> int | None:
    """The index of the largest size found to fit, or None."""
    high = len(ladder) - 1
    if fits(high):
        return high
    low = next((i for i in islice(_starts(ladder, known, headroom), tries) if i < high and fits(i)), None)
    if low is None:
        return None
    by_line, most = True, len(known) + tries
    while high - low > 1 and len(known) < most and known[ladder[low]] < enough * headroom:
        middle = (low + high) // 2
        if by_line:
            (a, below), (b, above) = ((ladder[i], known[ladder[i]]) for i in (low, high))
            middle = bisect_right(ladder, a + (b - a) * (headroom - below) / (above - below)) - 1
        middle = min(max(middle, low + 1), high - 1)
        before = high - low
        if fits(middle):
            low = middle
        else:
            high = middle
        # A line that took little away is followed by a half, and a half by a line.
        by_line = not by_line or high - low <= before // 2
    return low


def _starts(ladder: list[int], known: dict[int, int], headroom: int) -> Iterator[int]:
    """Where to look for a first size that fits: where half the headroom should do, then at 1, 2, 4 and so on.

    A single example may need more than two, so the first that does not fit is no reason to stop.
    """
    whole = ladder[-1]
    yield max(0, bisect_right(ladder, whole * headroom / max(1, known[whole]) / 2) - 1)
    size = 1
    while size < whole:
        yield bisect_right(ladder, size) - 1
        size *= 2


def nothing_fits(known: dict[int, int], budget: Budget, given: Any) -> Exception:
    """For a model of which not even one example fits."""
    size, least = min(known.items(), key=lambda item: (item[1], item[0]))
    what = (
        f"A micro-batch of {size} needs {format_bytes(least)} beside the {format_bytes(budget.in_use)} in use, "
        f"and {format_bytes(budget.headroom)} may be taken ({budget.source})."
    )
    if given is None:
        return MemoryError(
            f"No micro-batch fits in memory. {what} Free some, or use a smaller model or shorter inputs."
        )
    return ValueError(f"memory is too small for the model. {errors.received('memory', given)} {what}")


def timed(plan: Plan, needs: Callable[[int], int], seconds: Callable[[int], float], most: int = 5) -> Plan:
    """The plan with the fastest micro-batch of the largest, its half, its quarter and so on, each verified to fit.

    Args:
        plan: where to start from.
        needs: as `choose` takes it.
        seconds: measures one forward and backward at a size that fits.
        most: how many sizes to time.
    """
    ladder = sizes(plan.batch)
    tried, size = [], plan.largest
    while size and len(tried) < most:
        tried.append(ladder[bisect_right(ladder, size) - 1])
        size //= 2
    known = {c.micro_batch: c for c in plan.candidates}
    for size in dict.fromkeys(tried):
        candidate = known.get(size) or Candidate(size, needs(size))
        known[size] = candidate._replace(seconds=seconds(size)) if plan.fits(candidate) else candidate
    fastest = min(known.values(), key=lambda c: c.seconds_per_example)
    return replace(plan, micro_batch=fastest.micro_batch, candidates=tuple(known[size] for size in sorted(known)))


@dataclass
class Choice:
    """The micro-batch that `micro_batch="auto"` uses for one shape of batch.

    Attributes:
        plan: the plan it comes from.
        micro_batch: the most examples that a micro-batch may have; lowered when memory runs out all the same.
    """

    plan: Plan
    micro_batch: int

    def size(self, length: int) -> int:
        """The micro-batch for a batch of this length: as few micro-batches as possible, of nearly one size."""
        return -(-length // -(-length // self.micro_batch))


def log_choice(logger: logging.Logger, plan: Plan, started: float) -> None:
    """Warns what `micro_batch="auto"` chose, and how long that took since `started`, of `time.perf_counter()`."""
    logger.warning('micro_batch="auto": %s in %.1f s.', plan, time.perf_counter() - started)


def nothing_to_restore() -> Callable[[], None]:
    """The `save` of `fitting` for a run that writes to nothing."""
    return lambda: None


def fitting(
    run: Callable[[int], Result],
    choice: Choice,
    length: int,
    is_out_of_memory: Callable[[Exception], bool],
    logger: logging.Logger,
    save: Callable[[], Callable[[], None]] = nothing_to_restore,
) -> Result:
    """Runs `run(micro_batch)`; after an out-of-memory again with half the size, which `choice` keeps.

    Args:
        run: makes a whole window; it must not step an optimizer before it has all gradients.
        choice: what was planned; changed in place.
        length: of the batch.
        is_out_of_memory: tells an out-of-memory of the framework from any other error.
        logger: told of each lowering, as a warning.
        save: notes what `run` writes to, and returns a function that restores it. It is called before each run.

    Raises:
        Exception: whatever `run` raises that is no out-of-memory; an out-of-memory of micro-batches of one example,
            with a note that names the plan.
    """
    while True:
        restore, size = save(), choice.size(length)
        try:
            return run(size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                note = f'micro_batch="auto": not even one example at a time fits. Planned was: {choice.plan}'
                error.add_note(note)
                raise
        # Outside the except the failed frames are gone, and with them the tensors that they held.
        restore()
        choice.micro_batch = halved(length, size)
        message = 'micro_batch="auto": out of memory at %s; the window is run again with %s.'
        logger.warning(message, f"{size:,}", f"{choice.micro_batch:,}")


def halved(length: int, micro_batch: int) -> int:
    """The size at which a batch of this length comes in twice as many micro-batches, for when memory ran out anyway."""
    return -(-length // (2 * -(-length // micro_batch)))
