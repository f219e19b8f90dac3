"""The laws' small weights, treated as large ones are on PyTorch: fused, and their products deferred."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

try:
    from bigbatch.fused import torch_backward, torch_limits
except ModuleNotFoundError:  # --hide-fused: all gradients are autograd's
    torch_backward = torch_limits = None

AVAILABLE = torch_limits is not None

# Without a way to see whether what a node saved has hooks, all gradients are left to autograd.
takes_products = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="PyTorch before 2.10 does not tell enough"
)


@contextmanager
def limits(**changes: Any) -> Iterator[None]:
    """With other limits of what is worth fusing."""
    if torch_limits is None:
        yield
        return
    with mock.patch.object(torch_limits, "LIMITS", torch_limits.LIMITS._replace(**changes)):
        yield


@contextmanager
def small_ones_too(capacity: int = 8) -> Iterator[None]:
    """Fuses small weights too, and may defer so many rows of each."""
    with limits(cpu_elements=0, device_elements=0, device_work=0, rows=4 * capacity, smaller=0, capacity=capacity):
        yield


@contextmanager
def must_fuse(micro_batches: int) -> Iterator[None]:
    """Of a finite window: that gradients of weights went past autograd, in every micro-batch but the first.

    The first one may be the one in which they are compared with autograd's.
    """
    if torch_backward is None or not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"):
        yield
        return
    fused, differentiate = [], torch_backward.differentiate

    def counting(loss: Any, gradient: Any, graph: Any, sums: Any) -> None:
        fused.append(len(graph.uses))
        differentiate(loss, gradient, graph, sums)

    with mock.patch.object(torch_backward, "differentiate", counting):
        yield
    if micro_batches > 1:
        assert len(fused) == micro_batches, f"{len(fused)} of {micro_batches} micro-batches were looked at"
        assert all(fused[1:]), f"weights that went past autograd, by micro-batch: {fused}"
