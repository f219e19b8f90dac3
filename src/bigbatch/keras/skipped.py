"""Windows that hold no items: no update is made, and the log says why."""

import logging
from typing import Any

import numpy as np

from bigbatch.keras import losses
from bigbatch.skipped import BAD_ITEMS, NO_ITEMS

logger = logging.getLogger("bigbatch.keras")


def counted(terms: list[losses.Term], items: list[Any]) -> list[Any]:
    """The window's items of each kind, where all kinds are sums of weights or masks; else an empty list.

    Such a window may hold no items, and then makes no update. Examples are always there, and a sum needs no items.
    """
    kinds = {term.kind for term in terms}
    return [] if {losses.EXAMPLES, losses.SUM} & kinds else items


def report(*items: Any) -> None:
    """Logs why a window with these items made no update; nothing, where the items are not the reason."""
    counts = np.asarray(items)
    if not np.isfinite(counts).all():
        logger.warning(f"A window made no update: {BAD_ITEMS}. Sample weights are the items here.")
    elif not counts.any():
        logger.warning(f"A window made no update: {NO_ITEMS}. The weights of all its examples are 0.")
