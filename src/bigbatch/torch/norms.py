"""The 2-norm of several gradients together. `torch.nn.utils.get_total_norm` is there from PyTorch 2.6 on."""

from collections.abc import Iterable

import torch
from torch import Tensor


def _total_norm(tensors: Iterable[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


get_total_norm = getattr(torch.nn.utils, "get_total_norm", _total_norm)
