"""One window's sums: Σ nᵢ·gᵢ, Σ nᵢ·lossᵢ and Σ nᵢ (see `bigbatch.law`).

The sums are kept divided by `unit`, the items the window is planned to hold. When the plan comes true,
unit / Σ nᵢ is exactly 1 and the gradients need no pass at the end; otherwise they need one.

The gradients add up where autograd puts them, in `.grad`, with the weight nᵢ / unit folded into the loss.
Parameters narrower than the accumulation's dtype cannot: bf16 has eight bits, and a sum of 4,096 gradients in it
is wrong by 18 %. Then every gradient is taken out of `.grad` after its backward and added to a wide accumulator,
and the weight is applied there, where it can neither round nor underflow.

This is all that exactness needs. `bigbatch.fused.torch` reaches the same sums with less work, and is asked for here.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbatch.engines.torch_dtypes import exact, gradient_dtype, widened
from bigbatch.engines.torch_leaves import parameters_of

try:
    from bigbatch.fused import torch as fused
except ModuleNotFoundError:  # it was left out, and the plain loop does everything
    fused = None


def fused_path(*, in_ranks: bool, between_calls: bool = False) -> Any:
    """What makes windows fused (a `FusedPath`), or None where the folder `bigbatch.fused` was left out.

    Args:
        in_ranks: whether the gradients are reduced over ranks by bigbatch.
        between_calls: whether what is seen of weights is for all calls of `bb.backward`.
    """
    return None if fused is None else fused.FusedPath(fused.CALLS if between_calls else None, in_ranks=in_ranks)


class Window:
    """The sums of an open window.

    Args:
        planned: how many micro-batches are planned; with the first one's items it makes `unit`.
        unit: the items planned for the window, where they are known beforehand.
        dtype: what wide accumulators hold at least; None where gradients stay in `.grad`.
        fused: the `FusedBackward` that takes the place of autograd's backward, or None.

    Attributes:
        weight: what the open micro-batch's gradients still have to be multiplied by.
        folded: whether the weights go into the losses where the accumulators are wide too.
        repeats: how many of its micro-batches stand in for none, so that another rank's forward may run.
    """

    def __init__(
        self,
        *,
        planned: int = 1,
        unit: float | Tensor | None = None,
        dtype: torch.dtype | None = None,
        fused: Any = None,
    ):
        self.planned, self.unit, self.dtype, self.fused = planned, unit, dtype, fused
        self.weight: float | Tensor = 1.0
        self.folded = False
        self.micro_batches = self.repeats = 0
        self.items: float | Tensor = 0.0
        self.loss = torch.zeros(())
        self.sums: dict[Tensor, Tensor] = {}

    def parameters_of(self, loss: Tensor) -> list[Tensor]:
        """The leaves that the coming backward of this loss will give a gradient to."""
        return parameters_of(loss) if self.fused is None else self.fused.parameters_of(loss)

    def backward(self, loss: Tensor, items: float | Tensor, parameters: Iterable[Tensor], scaler: Any = None) -> None:
        """Differentiates one micro-batch's mean loss and adds the gradients. Never waits for the device.

        Args:
            loss: the mean loss.
            items: what it is the mean over.
            parameters: those whose gradients may have to leave `.grad`.
            scaler: multiplies the loss, or None.
        """
        weight, mean = self._weight_of(items), loss.detach()
        if scaler is not None:
            loss = scaler.scale(loss)
        gradient = self._fold(weight, loss)
        if self.fused is None:
            loss.backward(gradient=gradient)
        else:
            self.fused.backward(loss, gradient, None if self.dtype is None else self)
        if self.dtype is not None:
            self._drain(parameters)
        self._count(mean, items, weight)

    def _weight_of(self, items: float | Tensor) -> float | Tensor:
        if self.unit is None:
            # A masked micro-batch on the device may hold 0 items; the unit may be anything but that.
            first = items.clamp(min=1) if isinstance(items, Tensor) else items
            self.unit = first * self.planned
        return items / self.unit

    def _fold(self, weight: float | Tensor, loss: Tensor) -> Tensor | None:
        """The loss's own gradient, with the weight in it; None where the wide sums apply the weight."""
        if self.dtype is not None and not self.folded:
            self.weight = weight
            return None
        if isinstance(weight, Tensor):
            return weight.to(loss.device, loss.dtype)
        # new_full is a kernel on the device; torch.tensor(weight, device=…) would be a copy the host waits for.
        return loss.new_full((), weight)

    def _count(self, mean: Tensor, items: float | Tensor, weight: float | Tensor) -> None:
        """Adds the loss and the items.

        In place: a small tensor kept from every micro-batch would lie between the large ones that come and go, and the
        allocator would have to reach for fresh pages.
        """
        if self.micro_batches == 0:
            self.loss = mean.new_zeros((), dtype=torch.promote_types(mean.dtype, torch.float32))
        if isinstance(weight, Tensor):
            # A mean over no items is 0/0, and counts for nothing; 0 × NaN would not.
            self.loss.add_(torch.where(weight == 0, 0, mean * weight).to(self.loss.device))
        else:
            self.loss.add_(mean, alpha=weight)
        self.items = self.items + items
        self.micro_batches += 1

    def widen(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
        """From here on in wide accumulators, which start from what `.grad` holds."""
        self.flush()
        self.dtype, self.weight = dtype, 1.0
        self._drain(parameters)

    def _drain(self, parameters: Iterable[Tensor]) -> None:
        """Moves the gradients out of `.grad` into the wide sums."""
        for p in parameters:
            grad, p.grad = p.grad, None
            if grad is not None:
                self.add(p, grad)

    @torch.no_grad()
    def add(self, p: Tensor, grad: Tensor) -> None:
        """Adds one micro-batch's gradient, which is not used elsewhere, to a wide sum."""
        grad, weight, total = grad.to(widened(p, self.dtype or gradient_dtype(p))), self.weight, self.sums.get(p)
        if isinstance(weight, Tensor):
            grad, weight = grad * weight.to(grad.device), 1.0
        if total is not None and not total.is_sparse:
            total.add_(grad, alpha=weight)
            return
        grad = grad if weight == 1.0 else grad * weight
        self.sums[p] = grad if total is None else grad + total

    def flush(self) -> None:
        """Adds what the fused path has deferred: from here on every gradient is in its sum."""
        if self.fused is not None:
            self.fused.flush()

    def factors(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Copies of the factors of deferred products, for a checkpoint."""
        return {} if self.fused is None else self.fused.factors()

    def restore_factors(self, p: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds leftᵀ·right, whose factors a checkpoint has."""
        if self.fused is not None:
            self.fused.restore(p, left, right)
            return
        product = left.to(p.device).t().mm(right.to(p.device))
        p.grad = product if p.grad is None else p.grad.add_(product)

    def gradients(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The summed gradients, dense: of a sparse one, the values of its distinct rows. Writing to them is allowed."""
        self.flush()
        gradients = []
        for p in parameters:
            grad = self.sums.get(p, p.grad)
            if grad is not None and grad.is_sparse:
                grad = grad.coalesce()  # the same row may stand in several micro-batches
                if p in self.sums:
                    self.sums[p] = grad
                else:
                    p.grad = grad
                grad = grad.values()
            if grad is not None:
                gradients.append(grad)
        return gradients

    def round_into_grad(self) -> None:
        """Moves the wide sums into `.grad`, rounded; each is freed before the next one is rounded."""
        while self.sums:
            p, grad = self.sums.popitem()
            p.grad = grad.to(gradient_dtype(p))

    def read(self) -> tuple[float, float, float]:
        """Σ nᵢ·lossᵢ / unit, Σ nᵢ and unit. Here the host waits for the device."""
        loss, items, unit = numbers([self.loss, self.items, 1.0 if self.unit is None else self.unit])
        return loss, items, unit

    def close(self) -> "WindowTotals":
        """What the window holds and what makes means of its sums. Here the host waits for the device."""
        loss, items, unit = self.read()
        factor = unit / items if items else math.nan
        return WindowTotals(items, loss * factor, factor, self.micro_batches)


class WindowTotals(NamedTuple):
    """What a window holds, or the windows of all ranks together.

    Attributes:
        items: Σ nᵢ.
        loss: the mean loss, Σ nᵢ·lossᵢ / Σ nᵢ.
        factor: what this process's sums still have to be multiplied by to become means, unit / Σ nᵢ.
        micro_batches: how many there are.
        ended: whether every rank is at the end of its data.
        dense, sparse: for each parameter, on how many ranks it has such a gradient; empty for one process.
    """

    items: float
    loss: float
    factor: float
    micro_batches: int
    ended: bool = True
    dense: Sequence[float] = ()
    sparse: Sequence[float] = ()


def numbers(values: list[Any]) -> list[float]:
    """Numbers and scalar tensors as floats, the tensors read from their device at once."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors:
        return [float(v) for v in values]
    device = tensors[0].device
    read = iter(torch.stack([t.to(device, exact(device)) for t in tensors]).tolist())
    return [next(read) if isinstance(v, Tensor) else float(v) for v in values]


def scale_(gradients: list[Tensor], factor: float) -> None:
    """One pass over the gradients, in place; none where the factor is 1."""
    if gradients and factor != 1.0:
        # In torch's public list of foreach functions, underscore and all.
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
