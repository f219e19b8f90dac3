"""The dtypes that PyTorch's gradients have, and those that sums and counts of them need."""

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's gradient, which is not always its own from PyTorch 2.10 on."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def widened(parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a parameter's gradients add up in, where `dtype` is the narrowest to accumulate in."""
    return torch.promote_types(gradient_dtype(parameter), dtype)


def is_wide(parameters: Iterable[Tensor], dtype: torch.dtype | None) -> bool:
    """Whether some parameter's gradient is too narrow to accumulate in, now or once it is thawed."""
    return dtype is not None and any(widened(p, dtype) != gradient_dtype(p) for p in parameters)


def exact(device: torch.device) -> torch.dtype:
    """The dtype to count in. Apple's devices have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
