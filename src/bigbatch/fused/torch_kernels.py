"""Adds a factored gradient to a sum: leftᵀ·right for a matrix, or rows for a table, in one kernel where there is one.

It spares the temporary that autograd makes, as large as the weight, and the pass that adds it (measured in
benchmarks/torch_window.md). It does nothing where no kernel does both; then the product is made first.
"""

from typing import Any

import torch
from torch import Tensor

from bigbatch.engines.torch_dtypes import widened

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
# Before PyTorch 2.11 such a product could not be added to a float32 sum (pytorch/pytorch#167931).
HAS_WIDE_PRODUCTS = torch.version.cuda is not None and _VERSION >= (2, 11)


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


def table(weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> Tensor:
    """The gradient of a table that rows were looked up in, as autograd makes it."""
    return torch.ops.aten.embedding_dense_backward(gradients, indices, len(weight), padding, False)


def _widens(left: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies these 16-bit factors into float32, as CUDA's do."""
    narrow = left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    return narrow and dtype == torch.float32 and left.is_cuda and HAS_WIDE_PRODUCTS


class WideSum:
    """The wide sums of a `bigbatch.torch.window.Window`, to which factored gradients are added."""

    def __init__(self, window: Any):
        self._window = window

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds leftᵀ·right."""
        window, total = self._window, self._window.sums.get(weight)
        if total is None or isinstance(window.weight, Tensor) or not add_product(total, left, right, window.weight):
            window.add(weight, product(left, right, widened(weight, window.dtype)))

    def rows(self, weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> None:
        """Adds the gradients of a table's rows; those at the index `padding` are left out."""
        window, total = self._window, self._window.sums.get(weight)
        if total is None or total.is_sparse:
            window.add(weight, table(weight, indices, gradients, padding))
        else:
            add_rows(total, indices, gradients, padding, window.weight)
