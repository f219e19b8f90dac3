"""The norm of every micro-batch's gradient, for the noise scale (see `bigbatch.noise`).

The gradients add up in `.grad`, so a micro-batch's own is there only for a moment: a hook on each parameter sees it
before it is added, while it is still in the cache, and takes its norm. The norms stay on the device until the window
closes. A weight with a hook is left to autograd, so a measured window is not fused.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bigbatch.engines.torch_dtypes import exact
from bigbatch.engines.torch_hooks import register
from bigbatch.noise import Noise, NoiseScale, UntilNoise, one_in
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.norms import get_total_norm
from bigbatch.torch.window import Window, WindowTotals, numbers


class Meter:
    """Σ bᵢ‖gᵢ‖² of the windows that are measured, from hooks on the parameters while such a window is open.

    Args:
        every: the Accumulator's; `UntilNoise` measures every window.
        noise: the Accumulator's.

    Attributes:
        scale: the running noise scale.
        norms: of the parameters' gradients in the micro-batch so far.
    """

    def __init__(self, every: Any, noise: bool | int):
        self.one_in = one_in(noise, every)
        self.scale = NoiseScale()
        self.norms: list[Tensor] = []
        self.squares: float | Tensor = 0.0
        self.counted: float | Tensor = 0.0  # micro-batches that held items
        self._handles: list[Any] = []
        weakref.finalize(self, _remove, self._handles)

    def arm(self, index: int, parameters: Iterable[Tensor]) -> None:
        """Before the forward of the window of update `index`, which it measures or leaves alone."""
        self.disarm()
        self.squares = self.counted = 0.0
        if self.one_in and index % self.one_in == 0:
            see = _see(weakref.ref(self))
            self._handles += [register(p.register_hook, see) for p in parameters if p.requires_grad]

    def disarm(self) -> None:
        """Removes the hooks from the parameters."""
        _remove(self._handles)
        self.norms = []

    def take(self, window: Window, items: float | Tensor) -> None:
        """The micro-batch that was just added to the window. Never waits for the device."""
        norms, self.norms = self.norms, []
        if not norms or window.unit is None:
            return
        device = norms[0].device
        square = torch.stack([norm.to(device) for norm in norms]).to(exact(device)).square_().sum()
        # The gradients that the hooks saw were weighted with items / unit, where the window does not do that itself.
        factor = window.unit * window.unit / items if window.dtype is None else items
        if isinstance(items, Tensor):
            # A micro-batch without items has a factor of 1/0.
            square = torch.where(items == 0, 0, square.to(items.device) * factor)
            self.counted = self.counted + (items > 0)
        else:
            square, self.counted = square * factor, self.counted + 1
        self.squares = self.squares + square

    def noise(self, totals: WindowTotals, norm: Tensor, scaler: Any, ranks: Ranks | None = None) -> Noise | None:
        """The window's noise so far, or None where it is not measured. Here the host waits for the device.

        Args:
            totals: the window's, of all ranks.
            norm: the 2-norm of its sums, unscaled.
            scaler: the GradScaler that the norms in the hooks were scaled by, or None.
            ranks: whose micro-batches the window is made of, where there are several. It is then collective.
        """
        if not self._handles:
            return None
        counted, squares, norm_ = numbers([self.counted, self.squares, norm])
        if ranks is not None:
            counted, squares = ranks.meetings.all_reduce([counted, squares])
        return Noise.of(int(counted), totals.items, squares / _scale(scaler) ** 2, (norm_ * totals.factor) ** 2)

    def is_enough(self, plan: UntilNoise, window: Window, parameters: Iterable[Tensor], scaler: Any) -> bool:
        """Whether the window closes here. At a look the host waits for the device."""
        if window.micro_batches not in plan.looks or window.micro_batches == plan.at_most:
            return window.micro_batches >= plan.at_most
        norm = get_total_norm(window.gradients(parameters)) / _scale(scaler)
        noise = self.noise(window.close(), norm, scaler)
        return noise is not None and plan.is_enough(noise.items, noise.trace, noise.squared_norm)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and scalar tensors; the open window's sums are None where it is not measured."""
        sums = {"squares": self.squares, "counted": self.counted} if self._handles else None
        return {"scale": self.scale.state_dict(), "window": sums}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Goes on where `state_dict` was called, in a window just armed. One measured in part is left alone."""
        sums = None if state is None else state["window"]
        if state is not None:
            self.scale.load_state_dict(state["scale"])
        if sums is None:
            self.disarm()
        else:
            self.squares, self.counted = sums["squares"], sums["counted"]


def _see(meter: "weakref.ref[Meter]") -> Callable[[Tensor], None]:
    def see(grad: Tensor) -> None:
        if (living := meter()) is not None:
            values = grad.coalesce().values() if grad.is_sparse else grad
            dtype = torch.promote_types(grad.dtype, torch.float32)
            living.norms.append(torch.linalg.vector_norm(values.detach(), dtype=dtype))

    return see


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _scale(scaler: Any) -> float:
    return 1.0 if scaler is None else scaler.get_scale()
