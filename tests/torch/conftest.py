"""Fixtures that several of these files use."""

import pytest
import torch

from conformance.torch_products import small_ones_too

from .products import CAPACITY


@pytest.fixture
def whatever_its_size():
    """Weights of any size are fused, with buffers for `CAPACITY` deferred rows."""
    with small_ones_too(CAPACITY):
        yield


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randint(11, (10, 5)), torch.randint(11, (10, 5))
