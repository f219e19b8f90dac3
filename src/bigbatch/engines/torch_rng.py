"""The state of PyTorch's random generators, which an audit restores."""

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def kept(tensors: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Afterwards PyTorch draws what it would have drawn before, on the CPU and where the tensors are."""
    devices = {t.device for t in tensors} - {torch.device("cpu")}
    kind = next((device.type for device in devices), "cuda")
    return torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind)
