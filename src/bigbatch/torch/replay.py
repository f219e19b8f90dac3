"""Running a function once more as it ran before: its random state, its autocast, its modules' modes and buffers.

The second run works on stand-ins for the modules' parameters and on copies of their buffers. So no hook on a parameter
is called, no `.grad` is touched, and a buffer that the function writes to changes once.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bigbatch.engines.captures import closed_over, named_globals


class Moment(NamedTuple):
    """What a run started from: the random states that it drew from, and the buffers that it wrote to."""

    cpu: Tensor | None
    device: Tensor | None
    buffers: dict[str, Tensor]


class Holder(nn.Module):
    """Modules and the function that calls them as one module, so that `functional_call` can exchange parameters."""

    def __init__(self, function: Callable[..., Any], modules: list[nn.Module]):
        super().__init__()
        self.used = nn.ModuleList(modules)
        self.function = [function]  # in a list, so that a module is not registered twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function's own."""
        return self.function[0](*args, **kwargs)


class Setting:
    """What surrounds a function: the modules that it calls, autocast, and the device that it draws from."""

    def __init__(self, function: Callable[..., Any], device: torch.device):
        self.holder = Holder(function, list(dict.fromkeys(modules_of(function))))
        self.device = device
        self.training = {module: module.training for module in self.holder.modules()}
        # A cached cast would belong to the graph of one piece.
        self.autocast = [
            torch.autocast(
                kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
            )
            for kind in sorted({"cpu", device.type})
        ]

    def parameters(self) -> dict[str, Tensor]:
        """The modules' parameters that need a gradient, each once."""
        return {name: p for name, p in self.holder.named_parameters() if p.requires_grad}

    def run(self, args: Any, kwargs: Any, stand_ins: dict[str, Tensor] | None = None) -> tuple[Any, Moment]:
        """Runs the function, and returns what a second run needs of its start.

        It draws, and writes to buffers, as a call does; with other tensors for parameters where there are `stand_ins`.
        """
        cpu, device = torch.get_rng_state(), self._device_state()
        before = {name: (b, b._version, b.detach().clone()) for name, b in self.holder.named_buffers()}
        with contextlib.ExitStack() as stack:
            for autocast in self.autocast:
                stack.enter_context(autocast)
            result = functional_call(self.holder, stand_ins or {}, args, kwargs)
        now = dict(self.holder.named_buffers())
        written = {n: copy for n, (b, version, copy) in before.items() if now.get(n) is not b or b._version != version}
        drew = not torch.equal(cpu, torch.get_rng_state())
        drew_there = device is not None and not torch.equal(device, self._device_state())  # pyright: ignore[reportArgumentType]
        return result, Moment(cpu if drew else None, device if drew_there else None, written)

    def again(self, moment: Moment, stand_ins: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        """Runs the function from a moment with other tensors for parameters. It changes nothing else."""
        buffers = {name: b.detach().clone() for name, b in self.holder.named_buffers()}
        buffers |= {name: b.clone() for name, b in moment.buffers.items()}
        with contextlib.ExitStack() as stack:
            devices = [] if moment.device is None else [self.device]
            kind = "cuda" if moment.device is None else self.device.type
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
            if moment.cpu is not None:
                torch.set_rng_state(moment.cpu)
            if moment.device is not None:
                getattr(torch, self.device.type).set_rng_state(moment.device, self.device)
            for autocast in self.autocast:
                stack.enter_context(autocast)
            stack.enter_context(self._modes())
            return functional_call(self.holder, {**stand_ins, **buffers}, args, kwargs)

    def _device_state(self) -> Tensor | None:
        return None if self.device.type == "cpu" else getattr(torch, self.device.type).get_rng_state(self.device)

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        now = {module: module.training for module in self.training}
        for module, training in self.training.items():
            module.training = training
        try:
            yield
        finally:
            for module, training in now.items():
                module.training = training


def modules_of(function: Any, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """The modules that a function is, is bound to, closes over, or names among its globals and defaults."""
    seen = set() if seen is None else seen
    if id(function) in seen:
        return
    seen.add(id(function))
    if isinstance(function, nn.Module):
        yield function
        return
    if isinstance(function, functools.partial):
        parts: Any = (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, types.MethodType):
        parts = function.__self__, function.__func__
    elif isinstance(function, types.FunctionType):
        # Of globals not the functions: these may name anything.
        named = (value for value in named_globals(function) if isinstance(value, nn.Module | functools.partial))
        parts = *closed_over(function), *named, *(function.__defaults__ or ())
    elif isinstance(function, list | tuple):
        parts = function
    elif isinstance(function, dict):
        parts = list(function.values())
    else:
        return
    for part in parts:
        yield from modules_of(part, seen)
