"""What a micro-batch of a size needs: from dry runs on fake tensors, or on few examples where a loss takes none."""

import gc
import os
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bigbatch import host
from bigbatch.engines.torch_dry_run import FakeTensorMode, MemoryTracer, dry_run
from bigbatch.plan import NEVER


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: a device's, or one that has no exception type of its own, such as the CPU's."""
    return isinstance(error, torch.OutOfMemoryError) or host.is_out_of_memory(error)


def device_memory(device: torch.device) -> host.Memory:
    """What is in use and free there."""
    if device.type == "cpu":
        return host.memory()
    if device.type == "mps":
        in_use = torch.mps.driver_allocated_memory()
        return host.Memory(in_use, torch.mps.recommended_max_memory() - in_use, "the device")
    module = torch.get_device_module(device)
    free, _ = module.mem_get_info(device)
    in_use = module.memory_allocated(device)
    # What PyTorch's allocator has reserved and not allocated is as good as free.
    return host.Memory(in_use, free + module.memory_reserved(device) - in_use, str(device))


def reserve(device: torch.device) -> float:
    """The part of the free memory that is left alone.

    glibc's heap has holes between tensors of less than 32 MiB: it took two thirds more than the tensors themselves
    (benchmarks/memory.md), and may take more than that. There are no holes with another allocator, or where a lower
    threshold gives tensors pages of their own.
    """
    tuned = "MALLOC_MMAP_THRESHOLD_" in os.environ or "LD_PRELOAD" in os.environ
    return 0.1 if device.type != "cpu" or tuned else 0.45


def release(device: torch.device) -> None:
    """Frees what a failed window left: cycles that hold tensors, and what the allocator has reserved."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


class RandomState:
    """The random states that operations draw from: the CPU's, and the device's."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        """Sets them to what they were."""
        torch.set_rng_state(self.cpu)
        if self.own is not None:
            torch.get_device_module(self.device).set_rng_state(self.own, self.device)


class State:
    """What a window changes beside gradients: random states, and the buffers that are written to."""

    def __init__(self, device: torch.device, written: list[weakref.ref[Tensor]]):
        self.random = RandomState(device)
        self.buffers = [(t, t.detach().clone()) for ref in written if (t := ref()) is not None]

    def restore(self) -> None:
        """Sets it to what it was."""
        self.random.restore()
        for tensor, before in self.buffers:
            tensor.detach().copy_(before)


class LeakError(ValueError):
    """For a loss_fn that keeps what it computed."""


def _is_freed(tracer: MemoryTracer) -> bool:
    """Whether all tensors of a dry run are freed.

    Autograd's thread for a device holds the gradients for a moment after it has returned them, so this waits for it.
    """
    for _ in range(20):
        if not tracer.live:
            return True
        gc.collect()
        time.sleep(0.05 if tracer.live else 0)
    return not tracer.live


class DryRuns:
    """Predictions for one loss function and batch.

    Args:
        loss_fn: returns a micro-batch's mean loss, or a tuple of it and what else is in memory during the backward.
        cut: makes a micro-batch of so many examples.
        parameters_of: the leaves that a loss's backward gives a gradient to.
        length: of the batch.
        dtype: the narrowest to accumulate in.
        name: what the user calls `loss_fn`.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Any],
        cut: Callable[[int], Any],
        parameters_of: Callable[[Tensor], list[Tensor]],
        length: int,
        dtype: torch.dtype | None,
        name: str = "loss_fn",
    ):
        self.loss_fn, self.cut, self.parameters_of = loss_fn, cut, parameters_of
        self.length, self.dtype, self.name = length, dtype, name
        self.known: dict[int, int] = {}
        self.written: list[weakref.ref[Tensor]] = []
        self.device = torch.device("cpu")
        self.parameters = 0
        self.reason: str | None = None
        self._few: list[tuple[int, list[int]]] | None = None

    def needs(self, size: int) -> int:
        """Bytes that a window of micro-batches of `size` examples takes beside what is in use."""
        if self.reason is None:
            try:
                return max(self._dry_run(size, fake=True))
            except LeakError:
                raise
            except Exception as error:
                if self.known:  # then it is the size: BatchNorm refuses a single example
                    return NEVER
                # Whatever has no fake: a value, a shape that depends on one, a foreign library.
                self.reason = type(error).__name__
        if self._few is None:
            self._few = [(n, self._dry_run(n, fake=False)) for n in (min(self.length, n) for n in (4, 8))]
        (few, at_few), (more, at_more) = self._few
        if len(at_few) != len(at_more):  # the two ran different operations
            at_few, at_more = [max(at_few)], [max(at_more)]
        # A line for each operation: the one with the most in use at few examples need not be the one at many.
        slopes = [(b - a) / (more - few) if more > few else a / few for a, b in zip(at_few, at_more, strict=True)]
        return round(max(b + slope * (size - more) for b, slope in zip(at_more, slopes, strict=True)))

    def how(self) -> str:
        """Where the predictions come from."""
        if self.reason is None:
            return "predicted from fake tensors"
        return f"a straight line through runs on 4 and 8 examples, as {self.name} takes no fake tensors ({self.reason})"

    def notes(self) -> tuple[str, ...]:
        """What to know about the predictions."""
        inside = (
            "Copies inside the CPU's convolutions are in."
            if self.device.type == "cpu"
            else "Workspaces inside kernels are not in."
        )
        return (inside,)

    def _dry_run(self, size: int, *, fake: bool) -> list[int]:
        mode = FakeTensorMode() if fake else None
        tracer, state = MemoryTracer(mode), None if fake else RandomState(self.device)
        # A compiled model runs as it was written: the compiler may need less, and would compile for each size.
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
        try:
            with eager, mode or nullcontext():
                needs = dry_run(
                    tracer, self.loss_fn, lambda: self.cut(size), self.parameters_of, size < self.length, self.dtype
                )
        finally:
            if state is not None:
                tracer.undo()
                state.restore()
        self.device, self.parameters = tracer.device or self.device, tracer.parameters
        self.written = [weakref.ref(tensor) for tensor in tracer.written]
        if fake and not _is_freed(tracer):
            raise LeakError(
                f"{self.name} keeps a tensor beyond its call, and the one it has kept now has a shape and no "
                f"contents, for memory is planned on such. Received: {tracer.live} bytes kept. Run it once before "
                "(if it makes a cache), keep the tensor out of it, or pass micro_batch as a number."
            )
        return needs

    def seconds(self, size: int) -> float:
        """Of one forward and backward: the least of three, each for real."""
        before, least = State(self.device, self.written), float("inf")
        for _ in range(3):
            started = time.perf_counter()
            with torch.enable_grad():
                result = self.loss_fn(self.cut(size))
                loss = result[0] if isinstance(result, tuple) else result
                torch.autograd.grad(loss, self.parameters_of(loss), allow_unused=True)
            if self.device.type != "cpu":
                torch.get_device_module(self.device).synchronize(self.device)
            least = min(least, time.perf_counter() - started)
        before.restore()
        return least
