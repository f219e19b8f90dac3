"""Sums of weights' gradients in `.grad`, where the factors of small products wait for one multiplication.

The product of a micro-batch's few rows reads and writes the whole sum for little arithmetic. The rows of several
micro-batches put one under the other make one product, which is the sum of theirs. So rows wait, in buffers that
together take less memory than the temporary gradient that autograd would make.
"""

from collections.abc import Collection

import torch
from torch import Tensor

# So many at once, and a product is bound by arithmetic. A micro-batch of more than a quarter gains nothing by waiting.
ROWS = 256

# How much smaller than the weight a micro-batch's rows have to be: copying more costs what the sum is spared.
SMALL = 8


class Products:
    """The sums of one window: in `.grad`, and in what waits.

    Args:
        weights: those whose rows may wait. They share seven eighths of what the largest of them takes, as many rows for
            each. None of a GPU's do: its host has no time for that, and large products were no faster late.
    """

    def __init__(self, weights: Collection[Tensor] = ()) -> None:
        self._weights = {weight for weight in weights if weight.device.type == "cpu"}
        self._room = rows_for(self._weights)
        self._waiting: dict[Tensor, _Rows] = {}

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds leftᵀ·right, of shapes (rows, weight's rows) and (rows, weight's columns), inside a backward."""
        count = len(left)
        few = 4 * count <= ROWS and 2 * count <= self._room and SMALL * count * sum(weight.shape) <= weight.numel()
        if few and weight.dtype == left.dtype == right.dtype and weight in self._weights:
            self._place(weight).take(left, right)
        else:
            _multiply(weight, left, right)

    def rows(self, weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> None:
        """Adds the gradients of a table's rows, inside a backward; those at the index `padding` are left out."""
        if weight.grad is None and weight in self._waiting:
            self._waiting[weight].begin()
        total = weight.grad
        if total is None or total.is_sparse:
            _put(weight, table(weight, indices, gradients, padding))
        else:
            add_rows(total, indices, gradients, padding)

    @torch.no_grad()
    def settle(self) -> None:
        """Multiplies out what waits: from here on `.grad` is all there is."""
        while self._waiting:
            self._waiting.popitem()[1].multiply_out()

    def waiting(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """What waits, for a checkpoint: copies of the factors of each weight that has room."""
        return {weight: rows.held() for weight, rows in self._waiting.items()}

    def wait_again(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Gives a weight the rows that it had; where it has no room for them now, they are multiplied out."""
        left, right = left.to(weight.device), right.to(weight.device)
        if weight in self._weights and len(left) <= self._room:
            self._place(weight).take(left, right)
        else:
            _multiply(weight, left, right)

    def _place(self, weight: Tensor) -> "_Rows":
        rows = self._waiting.get(weight)
        if rows is None:
            rows = self._waiting[weight] = _Rows(weight, self._room)
        return rows


def rows_for(weights: Collection[Tensor]) -> int:
    """How many rows may wait for each of several weights."""
    each = sum(sum(weight.shape) * weight.itemsize for weight in weights)
    return min(ROWS, 7 * max(weight.nbytes for weight in weights) // (8 * each)) if weights else 0


class _Rows:
    """Room for the rows of one weight's products.

    And for their sum, so that a window of two takes as much memory as one of a thousand, which then does not run out of
    it on its way.
    """

    def __init__(self, weight: Tensor, room: int):
        self.weight = weight
        self.left, self.right = (weight.new_empty(room, size) for size in weight.shape)
        self.count = 0
        self.total = weight.new_empty(weight.shape) if weight.grad is None else None  # until it is `.grad`

    def take(self, left: Tensor, right: Tensor) -> None:
        """Copies rows in, after multiplying those out that leave them no room."""
        if self.count + len(left) > len(self.left):
            self.multiply_out()
        place = slice(self.count, self.count + len(left))
        self.left[place], self.right[place] = left, right
        self.count += len(left)

    def begin(self) -> None:
        """Makes `.grad` of the sum before anything is multiplied out, where there is none yet."""
        if self.total is not None and self.weight.grad is None:
            self.weight.grad = self.total.zero_()
        self.total = None

    def multiply_out(self) -> None:
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

    def held(self) -> tuple[Tensor, Tensor]:
        return self.left[: self.count].clone(), self.right[: self.count].clone()


def _multiply(weight: Tensor, left: Tensor, right: Tensor) -> None:
    total = weight.grad
    if total is None or not add_product(total, left, right):
        _put(weight, product(left, right, weight.dtype))


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """leftᵀ·right, unrounded where one kernel makes it in that wider dtype; in the factors' own elsewhere."""
    return torch.mm(left.t(), right, out_dtype=dtype) if _widens(left, right, dtype) else left.t().mm(right)


def add_product(total: Tensor, left: Tensor, right: Tensor, weight: float = 1.0) -> bool:
    """Adds weight·leftᵀ·right to a sum, if one kernel does both, and returns whether it does."""
    if total.is_sparse:
        return False
    if total.dtype == left.dtype == right.dtype:
        total.addmm_(left.t(), right, alpha=weight)
        return True
    if _widens(left, right, total.dtype):
        torch.addmm(total, left.t(), right, alpha=weight, out_dtype=total.dtype, out=total)
        return True
    return False


def add_rows(total: Tensor, indices: Tensor, gradients: Tensor, padding: int, weight: float | Tensor = 1.0) -> None:
    """Adds weight · the gradients of a table's rows to its sum; those at the index `padding` are left out."""
    if padding >= 0:
        gradients = gradients.masked_fill((indices == padding).unsqueeze(-1), 0)
    gradients = gradients.reshape(-1, gradients.shape[-1]).to(total.dtype)
    if isinstance(weight, Tensor):
        gradients, weight = gradients * weight.to(gradients.device), 1.0
    total.index_add_(0, indices.reshape(-1), gradients, alpha=weight)


def _widens(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies these 16-bit factors into float32, as CUDA's do.

    Before PyTorch 2.11 such a product could not be added to a float32 sum (pytorch/pytorch#167931).
    """
    narrow = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    return narrow and dtype == torch.float32 and left.is_cuda and _HAS_WIDE_PRODUCTS


_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
_HAS_WIDE_PRODUCTS = torch.version.cuda is not None and _VERSION >= (2, 11)


def table(weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> Tensor:
    """The gradient of a table that rows were looked up in, as autograd makes it."""
    return torch.ops.aten.embedding_dense_backward(gradients, indices, len(weight), padding, False)


def _put(weight: Tensor, gradient: Tensor) -> None:
    if weight.grad is None or weight.grad.is_sparse:
        gradient = gradient.to(weight.dtype)
        weight.grad = gradient if weight.grad is None else gradient + weight.grad
    else:
        weight.grad.add_(gradient)
