"""The laws' small weights, treated as large ones are on PyTorch: their gradients are taken from autograd, and wait."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from bigbatch.engines import torch_graph, torch_products


@contextmanager
def small_ones_too() -> Iterator[None]:
    """Takes the gradients of small weights too, and has room for some rows of each."""
    with (
        mock.patch.object(torch_graph, "SMALLEST", 0),
        mock.patch.object(torch_graph.Graph, "largest", 1 << 20),
        mock.patch.object(torch_products, "ROWS", 8),
    ):
        yield
