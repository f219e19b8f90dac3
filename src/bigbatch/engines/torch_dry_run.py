"""A dry run of one micro-batch's forward and backward: what it needs, and which tensors it writes to.

It runs on fake tensors, which have shapes and no contents, so a dry run at full size allocates nothing and takes
milliseconds. A loss that asks for values, as data-dependent control flow does, is run for real on few examples.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Not public, and the only way to run a model on shapes alone: tests/torch/test_private.py.
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from bigbatch.engines.torch_memory import PeakMemory

BLOCK = 16
"""oneDNN lays out channels in blocks of this many on a CPU with AVX-512, and of fewer elsewhere."""


class MemoryTracer(PeakMemory):
    """Counts memory, and remembers which tensors from outside are written to: buffers, such as running statistics.

    Args:
        fake: the mode that makes fake tensors of real ones; None to let the operations happen, with a copy of
            everything that they write to.

    Attributes:
        lives: for each operation the bytes in use at its end, and its workspace.
    """

    def __init__(self, fake: FakeTensorMode | None):
        super().__init__()
        self.fake = fake
        self.device: torch.device | None = None
        self.parameters = 0
        self.written: dict[Tensor, Tensor | None] = {}
        self.lives: list[int] = []
        self._stand_ins: dict[torch.UntypedStorage, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.fake is not None:
            args, kwargs = tree_map_only(Tensor, self._stand_in, (args, kwargs))
        for i, argument in enumerate(func._schema.arguments):
            if _is_written(func, argument):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if isinstance(tensor, Tensor):
                        self._remember(tensor)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.lives.append(self.live + _workspace(func, args, result))
        return result

    def _stand_in(self, tensor: Tensor) -> Tensor:
        # No real tensor may get through: an operation on it alone would happen.
        if isinstance(tensor, FakeTensor) or self.fake is None:
            return tensor
        stand_in = self.fake.from_tensor(tensor)
        self._stand_ins[stand_in.untyped_storage()] = tensor
        return stand_in

    def _remember(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if self.fake is not None:
            source = self._stand_ins.get(storage)
            if source is not None:
                self.written[source] = None
        elif storage not in self._seen and tensor not in self.written:
            self.written[tensor] = tensor.detach().clone()

    def undo(self) -> None:
        """Restores what was written to."""
        for tensor, copy in reversed(self.written.items()):
            if copy is not None:
                tensor.detach().copy_(copy)


def _is_written(func: Any, argument: Any) -> bool:
    # Batch normalization's schema does not declare that it writes to its running statistics.
    named = argument.name in ("running_mean", "running_var") and "backward" not in func.__name__
    return named or (argument.alias_info is not None and argument.alias_info.is_write)


def dry_run(
    tracer: MemoryTracer,
    loss_fn: Callable[[Any], Any],
    cut: Any,
    parameters_of: Callable[[Tensor], list[Tensor]],
    several: bool,
    dtype: torch.dtype | None,
) -> list[int]:
    """The bytes that one micro-batch takes inside a window, beside what was there before: at each operation.

    Args:
        tracer: is entered, and afterwards has what was written to.
        loss_fn: as the split API takes it.
        cut: makes the micro-batch.
        parameters_of: the leaves that a loss's backward gives a gradient to.
        several: whether the window has more than one micro-batch, so that gradients of the one before are in memory.
        dtype: the narrowest to accumulate in.
    """
    with torch.enable_grad(), tracer:
        result = loss_fn(cut())
        loss = result[0] if isinstance(result, tuple) else result
        tracer.device = loss.device
        parameters = parameters_of(loss)
        tracer.parameters = sum(p.nbytes for p in parameters)
        wide = {p: p.numel() * (p.dtype if dtype is None else torch.promote_types(p.dtype, dtype)).itemsize
                for p in parameters}  # fmt: skip
        in_place = all(size == p.nbytes for p, size in wide.items())
        standing = sum(wide.values()) if several else 0
        added = 0

        def add(grad: Tensor) -> None:
            # It is added to the one in `.grad`, and freed.
            nonlocal added
            size = grad.numel() * grad.element_size()
            tracer.live -= size
            added += size

        handles = [p.register_hook(add) for p in parameters] if several and in_place else []
        try:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
        finally:
            for handle in handles:
                handle.remove()
    # Wide sums are made one by one from the narrow gradients, all of which exist by then.
    ends = 0 if in_place else max(wide.values(), default=0) if several else sum(wide.values())
    needs = [standing + bytes_ for bytes_ in (*tracer.lives, tracer.live + ends)]
    del gradients
    tracer.live += added
    return needs


def _workspace(func: Any, args: Any, result: Any) -> int:
    """What a CPU's convolution takes inside: copies in blocks of channels of all that it reads and writes."""
    name = func.__name__.split(".")[0]
    if name not in ("convolution", "convolution_backward"):
        return 0
    x = args[1] if name == "convolution_backward" else args[0]
    y = args[0] if name == "convolution_backward" else result
    if x.device.type != "cpu" or x.ndim < 3 or not torch.backends.mkldnn.is_available() or x.dtype == torch.float64:
        return 0
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return 0
    read, made = _blocked(x), _blocked(y)
    return read + made if name == "convolution_backward" else made + max(0, read - y.nbytes)


def _blocked(x: Tensor) -> int:
    return x.shape[0] * -(-x.shape[1] // BLOCK) * BLOCK * math.prod(x.shape[2:]) * x.element_size()
