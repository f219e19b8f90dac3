"""What one window adds to the noise scale: inner products of its micro-batches' gradients, and of their mean.

A micro-batch's gradient exists for a moment, weighed and scaled for the sum: γ = (n/u)·s·g for each kind of items
(`bigbatch.keras.losses`). Its part in the window's mean gradient is Σ γ·f over the kinds, where f = u/(s·Σn) is known
at the window's end. So the kinds' inner products are added up, and f comes last; with one kind this is one norm.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from bigbatch.keras.noise import DECAY, Meter, meter_of
from bigbatch.noise import EMPTY, averaged, estimate


class Window(NamedTuple):
    """One window of a model that measures.

    Attributes:
        meter: the model's.
        measured: whether this window is: True, False, or a scalar tensor where the graph decides.
        scale: what the optimizer multiplies losses by.
    """

    meter: Meter
    measured: Any
    scale: Any


def opened(model: Any) -> Window | None:
    """At a window's start, or None where the model measures no noise. On JAX in the scope of the optimizer's state."""
    meter = meter_of(model)
    if meter is None:
        return None
    measured: Any = True
    if keras.backend.backend() == "torch":
        # Where Python runs every window it counts them: to read the optimizer's count the host would wait.
        measured = meter.begun % meter.one_in == 0
        meter.begun += 1
    elif meter.one_in > 1:
        measured = ops.equal(ops.mod(model.optimizer.iterations.value, meter.one_in), 0)
    one = ops.ones((), meter.dtype)
    return Window(meter, measured, model.optimizer.scale_loss(one))


def part(window: Window | None, gradients: list[list[Any]], examples: Any) -> Any:
    """One micro-batch's inner products over its examples, and a one, to be added up: of shape (kinds² + 1,), or None.

    Args:
        window: the window, or None.
        gradients: γ for each kind of items and each variable; None where there is none, and a function that returns
            it where computing it is deferred. It is called only where the window is measured.
        examples: how many the micro-batch holds.
    """
    if window is None or window.measured is False:
        return None

    def measure() -> Any:
        products = _products(window, gradients) / ops.cast(examples, window.meter.dtype)
        return ops.concatenate([products, ops.ones((1,), window.meter.dtype)])

    if window.measured is True:
        return measure()
    return ops.cond(window.measured, measure, lambda: ops.zeros((len(gradients) ** 2 + 1,), window.meter.dtype))


def closed(
    window: Window | None,
    parts: Any,
    gradients: list[list[Any]],
    factors: list[Any],
    examples: Any,
    loss: Any,
) -> dict[str, Any]:
    """Updates the meter, unless the window is not finite or one micro-batch, and returns its part of the step's logs.

    Args:
        window: the window, or None.
        parts: the sum of its micro-batches' `part`.
        gradients: Σ γ for each kind of items and each variable, as for `part`.
        factors: u / Σn for each kind; 1 for a sum.
        examples: how many examples they held.
        loss: the window's mean loss.
    """
    if window is None:
        return {}
    meter = window.meter

    def number(x: Any) -> Any:
        return ops.cast(x, meter.dtype)

    def measure() -> tuple[Any, Any]:
        f = ops.stack([number(factor) for factor in factors]) / window.scale
        both = ops.reshape(ops.expand_dims(f, 0) * ops.expand_dims(f, 1), (-1,))
        items, micro_batches = number(examples), parts[-1]
        # A micro-batch of b examples has the mean gradient B/b·Σ γ·f, and the mean of these is the window's.
        squares, square = items * items * ops.sum(both * parts[:-1]), ops.sum(both * _products(window, gradients))
        trace, squared_norm = estimate(micro_batches, items, squares, square)
        before: Any = ops.unstack(meter.moments.value, len(EMPTY))
        moments = averaged(before, trace, squared_norm, DECAY)
        good = ops.isfinite(trace) & ops.isfinite(squared_norm) & ops.isfinite(number(loss))
        good &= ops.greater(micro_batches, 1)
        return ops.where(good, ops.stack(moments), meter.moments.value), meter.windows + number(good)

    if window.measured is not False:
        measured: Any = (
            measure()
            if window.measured is True
            else ops.cond(window.measured, measure, lambda: (meter.moments.value * 1, meter.windows.value * 1))
        )
        moments, windows = measured
        meter.moments.assign(moments)
        meter.windows.assign(windows)
    return {meter.name: meter.scale()}


def _products(window: Window, gradients: list[list[Any]]) -> Any:
    """The inner products of the kinds' gradients, of shape (kinds²,)."""
    gradients = [[g() if callable(g) else g for g in of_kind] for of_kind in gradients]

    def product(one: list[Any], other: list[Any]) -> Any:
        total = ops.zeros((), window.meter.dtype)
        for a, b in zip(one, other, strict=True):
            if a is not None and b is not None:
                total += ops.sum(ops.cast(a, window.meter.dtype) * ops.cast(b, window.meter.dtype))
        return total

    return ops.stack([product(one, other) for one in gradients for other in gradients])
