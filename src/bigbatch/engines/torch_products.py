"""Sums of weights' gradients in `.grad`, where the factors of small products wait for one multiplication.

The product of a micro-batch's few rows reads and writes the whole sum for little arithmetic. The rows of several
micro-batches put one under the other make one product, which is the sum of theirs. So rows wait, in buffers that
together take no more memory than the temporary gradient that autograd would make.
"""

import torch
from torch import Tensor

# From so many on a product is bound by arithmetic, and gains nothing by waiting for more.
ROWS = 128


class Products:
    """The sums of one window: in `.grad`, and in what waits.

    Attributes:
        room: bytes that waiting rows may take in all: what the largest weight takes.
    """

    def __init__(self) -> None:
        self.room = 0
        self._waiting: dict[Tensor, _Rows] = {}

    @torch.no_grad()
    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds leftᵀ·right, of shapes (rows, weight's rows) and (rows, weight's columns)."""
        total = weight.grad
        # Room is made beside the sum itself, so that a window of two takes as much as one of a thousand.
        waiting = self._place(weight) if 2 * len(left) <= ROWS else None
        if total is None or total.is_sparse or not (total.dtype == left.dtype == right.dtype):
            # A window's first is a tensor of its own, which is autograd's to the bit.
            _put(weight, left.t().mm(right))
        elif waiting is None:
            total.addmm_(left.t(), right)
        else:
            waiting.take(left, right, total)

    @torch.no_grad()
    def rows(self, weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> None:
        """Adds the gradients of a table's rows; those at the index `padding` are left out."""
        total = weight.grad
        if total is None or total.is_sparse or total.dtype != gradients.dtype:
            _put(weight, table(weight, indices, gradients, padding))
            return
        if padding >= 0:
            gradients = gradients.masked_fill((indices == padding).unsqueeze(-1), 0)
        total.index_add_(0, indices.reshape(-1), gradients.reshape(-1, gradients.shape[-1]))

    @torch.no_grad()
    def settle(self) -> None:
        """Multiplies out what waits: from here on `.grad` is all there is."""
        while self._waiting:
            weight, rows = self._waiting.popitem()
            rows.multiply_out(weight.grad)

    def waiting(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """What waits, for a checkpoint: copies of the factors of each weight that has room."""
        return {weight: rows.held() for weight, rows in self._waiting.items()}

    def wait_again(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Gives a weight the room and the rows that it had."""
        rows = self._waiting[weight] = _Rows(weight)
        rows.take(left.to(weight.device), right.to(weight.device), weight.grad)

    def _place(self, weight: Tensor) -> "_Rows | None":
        rows = self._waiting.get(weight)
        if rows is None and _Rows.bytes(weight) <= self.room - sum(map(_Rows.bytes, self._waiting)):
            rows = self._waiting[weight] = _Rows(weight)
        return rows


class _Rows:
    """Room for the rows of one weight's products."""

    def __init__(self, weight: Tensor):
        self.left, self.right = (weight.new_empty(ROWS, size) for size in weight.shape)
        self.count = 0

    @staticmethod
    def bytes(weight: Tensor) -> int:
        return ROWS * sum(weight.shape) * weight.itemsize

    def take(self, left: Tensor, right: Tensor, total: Tensor | None) -> None:
        """Copies rows in, after multiplying those out that leave them no room."""
        if self.count + len(left) > ROWS:
            self.multiply_out(total)
        place = slice(self.count, self.count + len(left))
        self.left[place], self.right[place] = left, right
        self.count += len(left)

    def multiply_out(self, total: Tensor | None) -> None:
        if self.count and total is not None:
            total.addmm_(self.left[: self.count].t(), self.right[: self.count])
        self.count = 0

    def held(self) -> tuple[Tensor, Tensor]:
        return self.left[: self.count].clone(), self.right[: self.count].clone()


def table(weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> Tensor:
    """The gradient of a table that rows were looked up in, as autograd makes it."""
    return torch.ops.aten.embedding_dense_backward(gradients, indices, len(weight), padding, False)


def _put(weight: Tensor, gradient: Tensor) -> None:
    if weight.grad is None or weight.grad.is_sparse:
        gradient = gradient.to(weight.dtype)
        weight.grad = gradient if weight.grad is None else gradient + weight.grad
    else:
        weight.grad.add_(gradient)
