"""When a window closes: after a number of micro-batches, fixed or told by a function, or at so many items."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from bigbatch.errors import check_every, check_items


@dataclass(frozen=True)
class Items:
    """A window that closes once it holds at least `count` items. Made by `items`."""

    count: float

    def __repr__(self) -> str:
        return f"items({self.count})"


def items(count: float) -> Items:
    """Closes the window once it holds at least this many items, as in `every=bb.items(4096)`.

    The last micro-batch is never cut, so a window may hold up to one micro-batch more; the mean is over what it holds.

    Args:
        count: examples or tokens, whichever the micro-batches count.

    Raises:
        TypeError, ValueError: `count` is not a finite number above zero.
    """
    return Items(check_items(count))


# A callable takes the update's index and returns a number: an array or a tensor of each in compiled frameworks.
Every = int | Callable[[Any], Any] | Items


def as_every(every: Any) -> Every:
    """Accepts what `every` may be; a callable's answers are checked as they come."""
    if isinstance(every, Items) or callable(every):
        return cast(Every, every)
    return check_every(every)


def planned(every: Every, index: int) -> int | Items:
    """The plan for the window of update `index`, asked once, before its first micro-batch."""
    return check_every(every(index)) if callable(every) else every
