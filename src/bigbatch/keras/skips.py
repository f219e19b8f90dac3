"""Windows without items: all sample weights or masks are 0, or one of the weights is no weight. They make no update."""

import logging
from typing import Any

import numpy as np

from bigbatch.keras import losses

logger = logging.getLogger("bigbatch.keras")


def counted(described: list[losses.Term], items: list[Any]) -> list[Any]:
    """The window's items, of each kind that is a sum of weights or masks, where nothing else makes an update.

    Examples are always there, and a sum needs no items: with either, the list is empty.
    """
    kinds = list(dict.fromkeys(term.kind for term in described))
    return [] if {losses.EXAMPLES, losses.SUM} & set(kinds) else items


def say(*items: Any) -> None:
    """Says why a window with these items made no update; nothing, where the items are not why."""
    found = np.asarray(items)
    if not np.isfinite(found).all():
        logger.warning("A window made no update: a sample weight in it is negative, NaN or infinite.")
    elif not found.any():
        logger.warning("A window made no update: the weights of all its examples are 0.")
