"""The noise scale in `fit` (see `bigbatch.noise`): a metric of the model, so that every `jit` of Keras's carries it.

`bigbatch.keras.noise_window` measures the windows.
"""

from typing import Any

import keras
from keras import ops

from bigbatch.noise import EMPTY, NoiseScale

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
        self.begun = 0  # windows that have begun; counted on PyTorch only
        self.moments = self.add_variable((len(EMPTY),), "zeros", dtype, name="moments")
        self.windows = self.add_variable((), "zeros", dtype, name="windows")

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: predictions do not determine gradients."""

    def reset_state(self) -> None:
        """Nothing: the average goes on over epochs."""

    def result(self) -> dict[str, Any]:
        """Nothing, to `evaluate`; a training step's logs have `scale`."""
        return {}

    def scale(self) -> Any:
        """The running noise scale: NaN before the first window, inf while it is no larger than its noise."""
        moments: Any = ops.unstack(self.moments.value, len(EMPTY))
        trace, squared_norm = moments[2:4]
        known = squared_norm > 0
        ratio = ops.maximum(trace, 0) / ops.where(known, squared_norm, 1)
        return ops.where(known, ratio, ops.where(trace > 0, float("inf"), float("nan")))


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
