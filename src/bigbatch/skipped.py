"""Why a window made no update: what `Update.skipped` says, in one wording for every framework."""

NO_MICRO_BATCHES = "the window holds no micro-batches"
NO_ITEMS = "the window holds no items"
BAD_ITEMS = "a micro-batch's items are negative, NaN or infinite"
NO_GRADIENT = "no parameter of the optimizer got a gradient"
CARRIED = "carried: {held} stay in the open window"
DROPPED = "dropped: {held}"


def micro_batches(count: int) -> str:
    """`3 micro-batches`, for what a window holds."""
    return f"{count} micro-batch" + ("es" if count != 1 else "")


def not_finite(loss: float | str, norm: float | str) -> str:
    """For a window whose mean loss or gradient is NaN or infinite."""
    return f"the window is not finite: loss {loss}, gradient norm {norm}"
