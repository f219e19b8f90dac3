"""One window's sums: Σ nᵢ·gᵢ, Σ nᵢ·lossᵢ and Σ nᵢ (see `bigbatch.law`).

The sums are kept divided by `unit`, the items the window is planned to hold. When the plan comes true,
unit / Σ nᵢ is exactly 1 and the gradients need no pass at the end; otherwise they need one.

The gradients add up where autograd puts them, in `.grad`, with the weight nᵢ / unit folded into the loss.
Parameters narrower than the accumulation's dtype cannot: bf16 has eight bits, and a sum of 4,096 gradients in it
is wrong by 18 %. Then every gradient is taken out of `.grad` after its backward and added to a wide accumulator,
and the weight is applied there, where it can neither round nor underflow.

Where `bigbatch.fused.torch_graph` finds that a weight's gradient is a product, the sum takes its factors instead.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbatch.fused import torch_graph
from bigbatch.fused.torch_deferred import Products, add_product, add_rows, product, table
from bigbatch.fused.torch_graph import gradient_dtype


def is_wide(parameters: Iterable[Tensor], dtype: torch.dtype | None) -> bool:
    """Whether some parameter's gradient is too narrow to accumulate in, now or once it is thawed."""
    return dtype is not None and any(widened(p, dtype) != gradient_dtype(p) for p in parameters)


def widened(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a parameter's gradients add up in."""
    return torch.promote_types(gradient_dtype(tensor), dtype)


class Window:
    """The sums of an open window.

    Args:
        planned: how many micro-batches are planned; with the first one's items it makes `unit`.
        unit: the items planned for the window, where they are known beforehand.
        dtype: what wide accumulators hold at least; None where gradients stay in `.grad`.

    Attributes:
        weight: what the open micro-batch's gradients still have to be multiplied by.
        folded: whether the weights go into the losses where the accumulators are wide too.
        repeats: how many of its micro-batches stand in for none, so that another rank's forward may run.
    """

    def __init__(self, *, planned: int = 1, unit: float | Tensor | None = None, dtype: torch.dtype | None = None):
        self.planned = planned
        self.unit = unit
        self.dtype = dtype
        self.weight: float | Tensor = 1.0
        self.folded = False
        self.micro_batches = self.repeats = 0
        self.items: float | Tensor = 0.0
        self.loss = torch.zeros(())
        self.sums: dict[Tensor, Tensor] = {}
        self.products = Products()

    def backward(
        self,
        loss: Tensor,
        items: float | Tensor,
        parameters: Iterable[Tensor],
        scaler: Any = None,
        graph: torch_graph.Graph | None = None,
    ) -> None:
        """Differentiates one micro-batch's mean loss and adds the gradients. Never waits for the device.

        Args:
            loss: the mean loss.
            items: what it is the mean over.
            parameters: those whose gradients may have to leave `.grad`.
            scaler: multiplies the loss, or None.
            graph: the loss's, where weights' gradients may be taken from autograd.
        """
        if self.unit is None:
            # A masked micro-batch on the device may hold 0 items; the unit may be anything but that.
            first = items.clamp(min=1) if isinstance(items, Tensor) else items
            self.unit = first * self.planned
        weight = items / self.unit
        mean = loss.detach()
        if self.micro_batches == 0:
            self.loss = mean.new_zeros((), dtype=torch.promote_types(mean.dtype, torch.float32))
        if scaler is not None:
            loss = scaler.scale(loss)
        if self.dtype is not None and not self.folded:
            self.weight, folded = weight, None
        elif isinstance(weight, Tensor):
            folded = weight.to(loss.device, loss.dtype)
        else:
            # new_full is a kernel on the device; torch.tensor(weight, device=…) would be a copy the host waits for.
            folded = loss.new_full((), weight)
        if graph is None:
            loss.backward(gradient=folded)
        elif self.dtype is None:
            torch_graph.differentiate(loss, folded, graph, self.products)
        else:
            torch_graph.differentiate(loss, folded, graph, self)
        if self.dtype is not None:
            self._take(parameters)

        # In place: a small tensor kept from every micro-batch would lie between the large ones that come and go, and
        # the allocator would have to reach for fresh pages.
        if isinstance(weight, Tensor):
            # A mean over no items is 0/0, and counts for nothing; 0 × NaN would not.
            self.loss.add_(torch.where(weight == 0, 0, mean * weight).to(self.loss.device))
        else:
            self.loss.add_(mean, alpha=weight)
        self.items = self.items + items
        self.micro_batches += 1

    def widen(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
        """From here on in wide accumulators, which start from what `.grad` holds."""
        self.products.settle()
        self.dtype, self.weight = dtype, 1.0
        self._take(parameters)

    def _take(self, parameters: Iterable[Tensor]) -> None:
        """Moves the gradients out of `.grad` into the wide sums."""
        for p in parameters:
            grad, p.grad = p.grad, None
            if grad is not None:
                self.add(p, grad)

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds a gradient leftᵀ·right to a wide sum."""
        held = self.sums.get(weight)
        if held is None or isinstance(self.weight, Tensor) or not add_product(held, left, right, self.weight):
            self.add(weight, product(left, right, widened(weight, self.dtype or weight.dtype)))

    def rows(self, weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> None:
        """Adds the gradient of a table that rows were looked up in to a wide sum."""
        held = self.sums.get(weight)
        if held is None or held.is_sparse:
            self.add(weight, table(weight, indices, gradients, padding))
        else:
            add_rows(held, indices, gradients, padding, self.weight)

    @torch.no_grad()
    def add(self, p: Tensor, grad: Tensor) -> None:
        """Adds one micro-batch's gradient, which nobody else holds, to a wide sum."""
        grad, weight, held = grad.to(widened(p, self.dtype or gradient_dtype(p))), self.weight, self.sums.get(p)
        if isinstance(weight, Tensor):
            grad, weight = grad * weight.to(grad.device), 1.0
        if held is not None and not held.is_sparse:
            held.add_(grad, alpha=weight)
            return
        grad = grad if weight == 1.0 else grad * weight
        self.sums[p] = grad if held is None else grad + held

    def gradients(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """The summed gradients, dense: of a sparse one, the values of its distinct rows. Writing to them is allowed."""
        self.products.settle()
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

    def read(self) -> tuple[float, float, float]:
        """Σ nᵢ·lossᵢ / unit, Σ nᵢ and unit. Here the host waits for the device."""
        loss, items, unit = numbers([self.loss, self.items, 1.0 if self.unit is None else self.unit])
        return loss, items, unit

    def close(self) -> "Sums":
        """What the window holds and what turns its sums into means. Here the host waits for the device."""
        loss, items, unit = self.read()
        factor = unit / items if items else math.nan
        return Sums(items, loss * factor, factor, self.micro_batches)


class Sums(NamedTuple):
    """Σ nᵢ, Σ nᵢ·lossᵢ / Σ nᵢ, the factor unit / Σ nᵢ that the gradients still need, and how many i there are."""

    items: float
    loss: float
    factor: float
    micro_batches: int


def numbers(values: list[Any]) -> list[float]:
    """Numbers and scalar tensors as floats, the tensors read from their device at once."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    if not tensors:
        return [float(v) for v in values]
    device = tensors[0].device
    read = iter(torch.stack([t.to(device, exact(device)) for t in tensors]).tolist())
    return [next(read) if isinstance(v, Tensor) else float(v) for v in values]


def exact(device: torch.device) -> torch.dtype:
    """The dtype to count in. Apple's devices have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def scale_(gradients: list[Tensor], factor: float) -> None:
    """One pass over the gradients, in place; none where the factor is 1."""
    if gradients and factor != 1.0:
        # In torch's public list of foreach functions, underscore and all.
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
