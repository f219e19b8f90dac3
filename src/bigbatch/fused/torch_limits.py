"""From which sizes on the fused path of PyTorch pays: one value, which tests replace to try it on small weights.

Measured in benchmarks/torch_window.md on CPUs, and in benchmarks/growth-gpu.md on an H200.
"""

from typing import NamedTuple

from torch import Tensor


class Limits(NamedTuple):
    """What is worth fusing, and how much may be deferred.

    On a CPU a gradient is worth fusing where the pass that is spared takes longer than reading the graph for it. A GPU
    waits for its host unless it has much to do, and handing over a product takes the host longer (docs/pytorch.md).
    """

    cpu_elements: int = 1 << 17  # of a weight
    device_elements: int = 1 << 22
    device_work: int = 1 << 33  # elements of a weight × rows of a product
    # So many rows at once, and a product is bound by arithmetic. A micro-batch of more than a quarter gains nothing by
    # being deferred.
    rows: int = 256
    # How much smaller than the weight a micro-batch's rows have to be: copying more costs what the sum is spared.
    smaller: int = 8
    # How many rows may be deferred for each weight; None for as many as take 7/8 of the largest weight's memory.
    capacity: int | None = None


LIMITS = Limits()


def worth_fusing(weight: Tensor, rows: int | None = None) -> bool:
    """Whether a weight's gradient is worth taking from autograd: of so many rows, or of however many they will be."""
    if weight.device.type == "cpu":
        return weight.numel() >= LIMITS.cpu_elements
    if rows is None:
        return weight.numel() >= LIMITS.device_elements
    return weight.numel() * max(rows, 128) >= LIMITS.device_work
