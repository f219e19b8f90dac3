"""Sums of weights' gradients in `.grad`, where the factors of small products are deferred to become one matmul.

The product of a micro-batch's few rows reads and writes the whole sum for little arithmetic. The rows of several
micro-batches, one under the other, make one product, which is the sum of theirs. So rows are copied into buffers that
together take less memory than the temporary gradient that autograd would make. An MLP on a CPU with one example a
micro-batch takes 0.4 of the hand-written loop's time by it (benchmarks/torch_window.md). It does nothing for products
of many rows, on a GPU, and where the sums are wider than the weights.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from bigbatch.fused import torch_limits
from bigbatch.fused.torch_kernels import add_product, add_rows, product, table


class DeferredSum:
    """The sums of one window: in `.grad`, and in what is deferred.

    Args:
        weights: those whose products may be deferred. They share seven eighths of what the largest of them takes, as
            many rows for each. None of a GPU's are: its host has no time for that, and large products were no faster
            late.
    """

    def __init__(self, weights: Collection[Tensor] = ()) -> None:
        self._weights = {weight for weight in weights if weight.device.type == "cpu"}
        self._capacity = capacity_for(self._weights)
        self._buffers: dict[Tensor, FactorBuffer] = {}

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds leftᵀ·right, of shapes (rows, weight's rows) and (rows, weight's columns), inside a backward."""
        count, limits = len(left), torch_limits.LIMITS
        few = 4 * count <= limits.rows and 2 * count <= self._capacity
        small = limits.smaller * count * sum(weight.shape) <= weight.numel()
        if few and small and weight.dtype == left.dtype == right.dtype and weight in self._weights:
            self._buffer(weight).add(left, right)
        else:
            _multiply(weight, left, right)

    def rows(self, weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> None:
        """Adds the gradients of a table's rows, inside a backward; those at the index `padding` are left out."""
        if weight.grad is None and weight in self._buffers:
            self._buffers[weight].begin()
        total = weight.grad
        if total is None or total.is_sparse:
            _add(weight, table(weight, indices, gradients, padding))
        else:
            add_rows(total, indices, gradients, padding)

    @torch.no_grad()
    def flush(self) -> None:
        """Computes all deferred products: from here on `.grad` is all there is."""
        while self._buffers:
            self._buffers.popitem()[1].flush()

    def factors(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Copies of the deferred factors, for a checkpoint: of each weight that has a buffer."""
        return {weight: buffer.factors() for weight, buffer in self._buffers.items()}

    def restore(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Gives a weight the factors that it had; where the buffers are too small for them now, they are multiplied."""
        left, right = left.to(weight.device), right.to(weight.device)
        if weight in self._weights and len(left) <= self._capacity:
            self._buffer(weight).add(left, right)
        else:
            _multiply(weight, left, right)

    def _buffer(self, weight: Tensor) -> "FactorBuffer":
        buffer = self._buffers.get(weight)
        if buffer is None:
            buffer = self._buffers[weight] = FactorBuffer(weight, self._capacity)
        return buffer


def capacity_for(weights: Collection[Tensor]) -> int:
    """How many rows may be deferred for each of these weights."""
    limits = torch_limits.LIMITS
    if limits.capacity is not None:
        return limits.capacity
    each = sum(sum(weight.shape) * weight.itemsize for weight in weights)
    return min(limits.rows, 7 * max(weight.nbytes for weight in weights) // (8 * each)) if weights else 0


class FactorBuffer:
    """Memory for the deferred factors of one weight's products.

    And for their sum, so that a window of two takes as much memory as one of a thousand, which then does not run out of
    it on its way.
    """

    def __init__(self, weight: Tensor, capacity: int):
        self.weight = weight
        self.left, self.right = (weight.new_empty(capacity, size) for size in weight.shape)
        self.count = 0
        self.total = weight.new_empty(weight.shape) if weight.grad is None else None  # until it is `.grad`

    def add(self, left: Tensor, right: Tensor) -> None:
        """Copies rows in; where there is no space left for them, the product of those inside is computed first."""
        if self.count + len(left) > len(self.left):
            self.flush()
        place = slice(self.count, self.count + len(left))
        self.left[place], self.right[place] = left, right
        self.count += len(left)

    def begin(self) -> None:
        """Makes `.grad` of the sum before any product is computed, where there is none yet."""
        if self.total is not None and self.weight.grad is None:
            self.weight.grad = self.total.zero_()
        self.total = None

    def flush(self) -> None:
        """Adds the product of the rows inside to `.grad`."""
        if not self.count:
            # No rows at all are a gradient of zeros, as autograd makes it: not the same as none.
            self.begin()
            return
        left, right, total = self.left[: self.count], self.right[: self.count], self.total
        if total is None or self.weight.grad is not None:
            _multiply(self.weight, left, right)
        else:
            self.weight.grad = torch.mm(left.t(), right, out=total)
        self.count, self.total = 0, None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Copies of the rows inside."""
        return self.left[: self.count].clone(), self.right[: self.count].clone()


def _multiply(weight: Tensor, left: Tensor, right: Tensor) -> None:
    total = weight.grad
    if total is None or not add_product(total, left, right):
        _add(weight, product(left, right, weight.dtype))


def _add(weight: Tensor, gradient: Tensor) -> None:
    if weight.grad is None or weight.grad.is_sparse:
        gradient = gradient.to(weight.dtype)
        weight.grad = gradient if weight.grad is None else gradient + weight.grad
    else:
        weight.grad.add_(gradient)
