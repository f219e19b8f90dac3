"""The noise scale in `fit` (see `bigbatch.noise`): a metric of the model's, so that Keras carries it under every `jit`.

A micro-batch's gradient is there for a moment, weighed and scaled for the sum: γ = (n/u)·s·g for each kind of items
(`bigbatch.keras.losses`). Its part in the window's mean gradient is Σ γ·f over the kinds, where f = u/(s·Σn) is known
at the window's end. So the kinds' inner products are added up, and f comes last; with one kind this is one norm.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from bigbatch.noise import EMPTY, NoiseScale, averaged, estimate

DECAY = NoiseScale().decay


class Meter(keras.metrics.Metric):
    """The running moments of the windows that were measured; as a metric, they go through `fit` as its others do.

    They are not in what `evaluate` returns, since they are of training, and a new epoch leaves them, since they look
    back over more windows than an epoch may have.

    Args:
        one_in: one window in so many is measured.
    """

    def __init__(self, one_in: int):
        dtype = "float64" if keras.config.floatx() == "float64" else "float32"
        super().__init__(dtype, "noise_scale")
        self.one_in = one_in
        self.begun = 0  # windows; on PyTorch
        self.moments = self.add_variable((len(EMPTY),), "zeros", dtype, name="moments")
        self.windows = self.add_variable((), "zeros", dtype, name="windows")

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: predictions say nothing of gradients."""

    def reset_state(self) -> None:
        """Nothing: the average runs on."""

    def result(self) -> dict[str, Any]:
        """Nothing, to `evaluate`; a training step's logs have `scale`."""
        return {}

    def scale(self) -> Any:
        """The running noise scale: NaN before the first window, inf while the gradient is not told from noise."""
        moments: Any = ops.unstack(self.moments.value, len(EMPTY))
        trace, squared_norm = moments[2:4]
        known = squared_norm > 0
        ratio = ops.maximum(trace, 0) / ops.where(known, squared_norm, 1)
        return ops.where(known, ratio, ops.where(trace > 0, float("inf"), float("nan")))


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


def meter_of(model: Any) -> Meter | None:
    """The model's meter, or None where it measures no noise."""
    return next((metric for metric in model._metrics if isinstance(metric, Meter)), None)


def attach(model: Any, one_in: int) -> None:
    """Gives the model a new meter; of 0, none."""
    # Not public, for a built model takes no attributes. tests/keras/test_private.py fails when it moves.
    model._metrics[:] = [metric for metric in model._metrics if not isinstance(metric, Meter)]
    if one_in:
        model._metrics.append(Meter(one_in))


def devices(model: Any) -> int:
    """Over how many devices a batch is spread."""
    layout = keras.distribution.distribution()
    mesh = 1 if layout is None else layout.device_mesh.devices.size
    return max(mesh, getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1))


def check_devices(model: Any, noise: bool | int = True) -> None:
    """Refuses to measure what is spread over devices."""
    if devices(model) > 1:
        raise ValueError(
            f"The noise scale is measured on one device. Received: noise={noise}, {devices(model)} devices. "
            "Leave noise out, or measure on one device."
        )


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
        gradients: γ for each kind of items and each variable; None where there is none.
        examples: that the micro-batch holds.
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
    """Takes the window in, unless it is not finite or one micro-batch, and returns what it adds to the step's logs.

    Args:
        window: the window, or None.
        parts: the sum of its micro-batches' `part`.
        gradients: Σ γ for each kind of items and each variable.
        factors: u / Σn for each kind; 1 for a sum.
        examples: how many examples they held.
        loss: the window's.
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
        # A micro-batch of b examples has the mean gradient B/b·Σ γ·f, so that these come to the window's.
        squares, square = items * items * ops.sum(both * parts[:-1]), ops.sum(both * _products(window, gradients))
        trace, squared_norm = estimate(micro_batches, items, squares, square)
        before: Any = ops.unstack(meter.moments.value, len(EMPTY))
        moments = averaged(before, trace, squared_norm, DECAY)
        good = ops.isfinite(trace) & ops.isfinite(squared_norm) & ops.isfinite(number(loss))
        good &= ops.greater(micro_batches, 1)
        return ops.where(good, ops.stack(moments), meter.moments.value), meter.windows + number(good)

    if window.measured is not False:
        taken: Any = (
            measure()
            if window.measured is True
            else ops.cond(window.measured, measure, lambda: (meter.moments.value * 1, meter.windows.value * 1))
        )
        moments, windows = taken
        meter.moments.assign(moments)
        meter.windows.assign(windows)
    return {meter.name: meter.scale()}


def noise_scale(model: keras.Model) -> NoiseScale:
    """The running gradient noise scale, in examples, of the windows that `fit` measured. The host waits for the device.

    For callbacks too, and between calls of `fit`. It looks back over about 40 measured windows, whatever the epoch.

    Args:
        model: a model that `bb.accumulate(model, …, noise=True)` was called on.

    Raises:
        ValueError: it measures no noise.
    """
    meter = meter_of(model)
    if meter is None:
        raise ValueError("The model measures no noise. Pass noise=True to bb.accumulate.")
    if keras.backend.backend() == "jax":
        model.jax_state_sync()  # pyright: ignore[reportAttributeAccessIssue]
    running = NoiseScale(DECAY)
    moments: Any = ops.convert_to_numpy(meter.moments)
    windows: Any = ops.convert_to_numpy(meter.windows)
    running.load_state_dict({"decay": DECAY, "windows": int(windows), "moments": moments})
    return running


def _products(window: Window, gradients: list[list[Any]]) -> Any:
    """The inner products of the kinds' gradients, of shape (kinds²,)."""
    # One that waits to be multiplied out comes as a function, called only where the window is measured.
    gradients = [[g() if callable(g) else g for g in several] for several in gradients]

    def product(one: list[Any], other: list[Any]) -> Any:
        total = ops.zeros((), window.meter.dtype)
        for a, b in zip(one, other, strict=True):
            if a is not None and b is not None:
                total += ops.sum(ops.cast(a, window.meter.dtype) * ops.cast(b, window.meter.dtype))
        return total

    return ops.stack([product(one, other) for one in gradients for other in gradients])
