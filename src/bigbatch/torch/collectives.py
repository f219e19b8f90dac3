"""What ranks do together: the meetings in which they exchange a few numbers, and what is reported where one fails.

Every meeting is one all-gather of lines of one length, whatever it is about. So ranks that are at different calls meet
all the same, and learn where the others are; messages of different lengths would abort the process under gloo. A rank
whose own check has failed comes to the meeting too, and reports that.
"""

import atexit
import functools
import hashlib
import itertools
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigbatch import errors

MAKING, BACKWARD, FLUSH, JOIN, LOAD, SPLIT = CALLS = (
    "Accumulator(...)",
    "Accumulator.backward",
    "Accumulator.flush",
    "Accumulator.join",
    "Accumulator.load_state_dict",
    "bigbatch.torch.backward",
)
_NUMBERS = 6  # in a line, after the call, the failure and the digest


class Meetings:
    """The meetings of a process group's ranks. Every method is collective, except where there is one rank.

    Args:
        group: the ranks.
        device: where the parameters are.

    Attributes:
        size, rank: how many ranks there are, and which of them this is.
        owner: the class whose calls the ranks meet at, for messages.
        lost: why the ranks cannot meet any more, or None: one of them is gone, or is in the middle of a reduction.
    """

    def __init__(self, group: Any, device: torch.device):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        # Numbers are exchanged on the host where the group can do that: counting items then needs no synchronisation
        # with a GPU.
        on_host = "cpu:" in dist.get_backend_config(group)
        self.device = torch.device("cpu") if on_host else device
        self.lost: Exception | None = None
        self.owner = "Accumulator"

    def gather(
        self, call: str, numbers: Sequence[float] = (), digest: int = 0, error: Exception | None = None
    ) -> list[list[float]]:
        """One line of each rank: the digest and the numbers. Where `error` is given it returns what the failed have.

        Args:
            call: where this rank is, of `CALLS`.
            numbers: at most six.
            digest: of anything, below 2^48.
            error: why this rank cannot take part.

        Raises:
            RuntimeError: another rank has failed, is at another call, or is gone.
        """
        if self.lost is not None:
            raise errors.rank_lost(self.lost)
        line = [CALLS.index(call), error is not None, digest, *numbers, *[0] * (_NUMBERS - len(numbers))]
        lines = self._all_gather(line) if self.size > 1 else [[float(number) for number in line]]
        failed = [rank for rank, line in enumerate(lines) if line[1]]
        if failed:
            messages = self.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
            if error is None:
                raise errors.rank_failed(failed[0], messages[failed[0]])
            return [lines[rank][2:] for rank in failed]
        calls = [CALLS[int(line[0])] for line in lines]
        # A rank at the end of its data closes the others' windows with them.
        if len({BACKWARD if name == FLUSH else name for name in calls}) > 1:
            raise errors.ranks_apart([call.replace("Accumulator", self.owner) for call in calls])
        return [line[2:] for line in lines]

    def gather_objects(self, mine: Any) -> list[Any]:
        """Any object, of each rank."""
        every_rank: list[Any] = [mine] * self.size
        if self.size > 1:
            self.collective(dist.all_gather_object, every_rank, mine, group=self.group)
        return every_rank

    def agree(self, terms: dict[Any, Any], lines: list[list[float]]) -> None:
        """Refuses, on every rank, terms that the ranks do not have alike.

        Args:
            terms: this rank's.
            lines: what `gather` returned for their `digest_of`.

        Raises:
            ValueError: two ranks have different terms; it names the first of them.
        """
        if len({line[0] for line in lines}) == 1:
            return
        every_rank = self.gather_objects({name: str(value) for name, value in terms.items()})
        for name in dict.fromkeys(name for rank in every_rank for name in rank):
            values = [rank.get(name, "none") for rank in every_rank]
            if len(set(values)) > 1:
                raise errors.ranks_disagree(name if isinstance(name, str) else " ".join(map(str, name)), values)

    @contextmanager
    def reporting(self, call: str) -> Iterator[None]:
        """Reports an error that is raised inside to the other ranks, which would otherwise wait without end."""
        try:
            yield
        except Exception as error:
            self.report(call, error)
            raise

    def report(self, call: str, error: Exception) -> bool:
        """Reports this rank's error; whether all ranks reported one, so that none of them has gone on."""
        with suppress(RuntimeError):  # the others are gone, and the error at hand says more
            return len(self.gather(call, error=error)) == self.size
        return False

    def all_reduce(self, numbers: list[Any]) -> list[float]:
        """Each number, of all ranks together: right after a meeting, which has shown that they are in step."""
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.size > 1:
            self.collective(dist.all_reduce, sums, group=self.group)
        return sums.tolist()

    def collective(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """As `checked_collective`. Once it has failed, the ranks do not meet again."""
        try:
            return checked_collective(function, *arguments, **options)
        except RuntimeError as error:
            self.lost = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise

    def _all_gather(self, line: list[float]) -> list[list[float]]:
        mine = torch.tensor(line, dtype=torch.float64, device=self.device)
        every_rank = [torch.empty_like(mine) for _ in range(self.size)]
        self.collective(dist.all_gather, every_rank, mine, group=self.group)
        return torch.stack(every_rank).tolist()


def digest_of(terms: Any) -> int:
    """48 bits, which a float64 holds; equal on two ranks where the terms have the same `repr`."""
    return int.from_bytes(hashlib.blake2b(repr(terms).encode(), digest_size=6).digest(), "big")


# Tensors that gloo's threads may still hold. A thread frees its tensor a little after the collective returns, and needs
# the interpreter for one that Python has seen: where that has exited, the process is aborted, as in
# pytorch/pytorch#179291.
_SENT: "weakref.WeakSet[Tensor]" = weakref.WeakSet()


def checked_collective(collective: Any, *arguments: Any, **options: Any) -> Any:
    """A collective, with an error that explains where a rank is gone.

    The caller must not keep the tensors themselves: when Python exits, it waits until they are freed.
    """
    _at_exit(_wait_for_gloo)
    tensors = itertools.chain.from_iterable(x if isinstance(x, list) else [x] for x in arguments)
    _SENT.update(x for x in tensors if isinstance(x, Tensor) and x.is_cpu)
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:  # DistBackendError and DistNetworkError too
        _SENT.clear()  # the traceback has them
        raise errors.rank_lost(error) from error


_at_exit = functools.cache(atexit.register)  # once


def _wait_for_gloo(seconds: float = 1.0) -> None:
    time.sleep(0.1)  # for threads with tensors of other senders, such as fully_shard, which are not in _SENT
    until = time.monotonic() + seconds
    while len(_SENT) and time.monotonic() < until:
        time.sleep(0.001)
