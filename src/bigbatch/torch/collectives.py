"""What ranks do together: what is said where a partner is gone, and that Python exits after gloo's threads are done."""

import atexit
import functools
import time
import weakref
from typing import Any

from torch import Tensor

from bigbatch import errors

# What gloo's threads may still hold. They let go of a tensor a little after the host goes on, and of one that Python
# has seen they ask for the interpreter: where that has exited, the process is aborted (pytorch/pytorch#179291).
_SENT: "weakref.WeakSet[Tensor]" = weakref.WeakSet()


def or_lost(collective: Any, *arguments: Any, **options: Any) -> Any:
    """A collective, and what to tell a rank whose partner is gone.

    Nobody else is to have the tensor itself afterwards: when Python exits, it waits until it is gone.
    """
    _at_exit(_wait_for_gloo)
    _SENT.update(x for x in arguments if isinstance(x, Tensor) and x.is_cpu)
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:  # DistBackendError and DistNetworkError too
        _SENT.clear()  # the traceback has them
        raise errors.rank_lost(error) from error


_at_exit = functools.cache(atexit.register)  # once


def _wait_for_gloo(seconds: float = 1.0) -> None:
    time.sleep(0.1)  # what others sent, such as fully_shard, is not known: who waits for the interpreter gets it now
    until = time.monotonic() + seconds
    while len(_SENT) and time.monotonic() < until:
        time.sleep(0.001)
