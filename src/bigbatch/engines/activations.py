"""Where two runs of a model part: the first module whose outputs differ though its inputs do not."""

from collections.abc import Iterable

import numpy as np

Arrays = list[np.ndarray]


class ActivationDiff:
    """Compares a run over a batch's first examples with one over all of them, module call by module call.

    Args:
        whole: whether the second run is over all examples too.
        allowed: the relative difference that is rounding.

    Attributes:
        differing: the names of the modules that differ.
    """

    def __init__(self, whole: bool, allowed: float):
        self.whole, self.allowed = whole, allowed
        self.seen: list[tuple[str, Arrays, Arrays]] = []
        self.differing: list[str] = []

    def record(self, name: str, inputs: Arrays, outputs: Arrays) -> None:
        """Of the first run; the arrays are kept."""
        self.seen.append((name, inputs, outputs))

    def compare(self, name: str, inputs: Arrays, outputs: Arrays) -> list[np.ndarray | None]:
        """Of the second run.

        Returns:
            Nothing where the module does not differ. Otherwise what the first run had for each output, or None. The
            second run goes on with it, so that later modules are compared by their own effect alone.
        """
        if not self.seen or self.seen[0][0] != name:
            self.seen.clear()  # from here on this run calls other modules than the first
            return []
        _, inputs_then, outputs_then = self.seen.pop(0)
        if not self._agree(inputs_then, inputs) or self._agree(outputs_then, outputs):
            return []
        self.differing.append(name)
        return [self._part(then, now) for then, now in zip(outputs_then, outputs, strict=False)]

    def _agree(self, full: Iterable[np.ndarray], part: Iterable[np.ndarray]) -> bool:
        """Whether the examples of `part` had the same values in the whole batch."""
        for then, now in zip(full, part, strict=False):
            same = self._part(then, now)
            if same is None or same.dtype != now.dtype:
                continue
            if not np.issubdtype(now.dtype, np.inexact) and now.dtype.kind != "V":  # V is bfloat16
                if not np.array_equal(same, now):
                    return False
                continue
            one, two = (x if np.iscomplexobj(x) else x.astype(np.float64) for x in (same, now))
            allowed = self.allowed * max(float(np.abs(one).max(initial=0)), 1e-30)
            if not np.allclose(one, two, rtol=0, atol=allowed, equal_nan=True):
                return False
        return True

    def _part(self, full: np.ndarray, part: np.ndarray) -> np.ndarray | None:
        """The whole batch's values for the examples in `part`; None where no axis is that of the examples."""
        if self.whole:
            return full if full.shape == part.shape else None
        axes = [axis for axis, (n, k) in enumerate(zip(full.shape, part.shape, strict=False)) if n != k]
        if full.ndim != part.ndim or len(axes) != 1 or full.shape[axes[0]] < part.shape[axes[0]]:
            return None
        return full[tuple(slice(k) for k in part.shape)]
