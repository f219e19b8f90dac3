"""The laws' small weights, treated as large ones are on PyTorch: their gradients are taken from autograd, and wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from bigbatch.fused import torch_deferred, torch_graph

# Where it cannot be told whether what a node saved has hooks, all gradients are left to autograd.
takes_products = pytest.mark.skipif(
    not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"), reason="PyTorch before 2.10 does not tell enough"
)


@contextmanager
def small_ones_too(room: int = 8) -> Iterator[None]:
    """Takes the gradients of small weights too, and has room for so many rows of each."""
    with (
        mock.patch.object(torch_graph, "is_worth", return_value=True),
        mock.patch.object(torch_deferred, "ROWS", 4 * room),
        mock.patch.object(torch_deferred, "SMALL", 0),
        mock.patch.object(torch_deferred, "rows_for", return_value=room),
    ):
        yield
