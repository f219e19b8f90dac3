"""Running a function once more as it ran before: its random state, its autocast, its modules' modes and buffers.

The second run works on stand-ins for the modules' parameters and on copies of their buffers. So no hook on a parameter
is called, no `.grad` is touched, and a buffer that the function writes to changes once.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bigbatch.engines.captures import closed_over, named_globals
from bigbatch.engines.torch_estimate import RandomState

Result = TypeVar("Result")


class Moment(NamedTuple):
    """What a run started from."""

    random: RandomState | None  # None where it drew nothing
    buffers: list[Tensor]  # copies, shared by moments between which nothing was written
    writes: bool  # whether it wrote to buffers

    @property
    def repeats_in_parts(self) -> bool:
        """Whether fewer examples at a time would give the same: what is drawn, or averaged, depends on all of them."""
        return self.random is None and not self.writes


class Holder(nn.Module):
    """Modules as one module, so that `functional_call` can exchange their parameters while something runs."""

    def __init__(self, modules: list[nn.Module]):
        super().__init__()
        self.used = nn.ModuleList(modules)

    def forward(self, work: Callable[[], Any]) -> Any:
        """What `work` returns."""
        return work()


class Setting:
    """What surrounds a function: the modules that it calls, autocast, and the device that it draws from."""

    def __init__(self, function: Callable[..., Any], device: torch.device):
        self.function, self.device = function, device
        self.holder = Holder(list(dict.fromkeys(modules_of(function))))
        self.training = {module: module.training for module in self.holder.modules()}
        self.slots = [(module, name) for module in self.training for name, _ in module.named_buffers(recurse=False)]
        self.autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in sorted({"cpu", device.type})
        }
        self._seen: list[tuple[Any, int]] = []
        self._copies: list[Any] = []

    def parameters(self) -> dict[str, Tensor]:
        """The modules' parameters that need a gradient, each once."""
        return {name: p for name, p in self.holder.named_parameters() if p.requires_grad}

    def replaced(self, stand_ins: dict[str, Tensor], work: Callable[[], Result]) -> Result:
        """What `work` returns, which finds other tensors in the place of parameters."""
        return functional_call(self.holder, stand_ins, (work,))

    def run(self, args: Any, kwargs: Any) -> tuple[Any, Moment]:
        """Runs the function, which draws and writes to buffers as a call does, and what a second run starts from."""
        random, buffers = RandomState(self.device), self._snapshot()
        result = self._called(args, kwargs)
        writes = any(a is not b for a, b in zip(buffers, self._snapshot(), strict=True))
        return result, Moment(random if _has_moved(random) else None, buffers, writes)

    def again(self, moment: Moment, args: Any, kwargs: Any) -> Any:
        """Runs the function from a moment, and leaves random states, modes and buffers as they were."""
        copies = {
            id(b): b.clone() if moment.writes and b is not None else b for b in moment.buffers
        }  # tied ones stay so
        buffers, random = self._buffers(), RandomState(self.device) if moment.random else None
        modes = {module: module.training for module in self.training}
        try:
            if moment.random:
                moment.random.restore()
            _set_modes(self.training)
            self._set_buffers([copies[id(b)] for b in moment.buffers])
            return self._called(args, kwargs)
        finally:
            self._set_buffers(buffers)
            _set_modes(modes)
            if random:
                random.restore()

    def save(self) -> Callable[[], None]:
        """Remembers random states and buffers; the returned function restores them."""
        random, buffers = RandomState(self.device), self._buffers()
        copies = [b if b is None else b.detach().clone() for b in buffers]

        def restore() -> None:
            random.restore()
            self._set_buffers(buffers)
            for b, copy in zip(buffers, copies, strict=True):
                if copy is not None:
                    b.detach().copy_(copy)

        return restore

    def _called(self, args: Any, kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                if enabled or torch.is_autocast_enabled(kind):
                    # A cached cast would belong to the graph of one piece.
                    stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
            return self.function(*args, **kwargs)

    def _buffers(self) -> list[Any]:
        return [getattr(module, name, None) for module, name in self.slots]

    def _set_buffers(self, buffers: list[Any]) -> None:
        for (module, name), b in zip(self.slots, buffers, strict=True):
            if getattr(module, name, None) is not b:
                setattr(module, name, b)

    def _snapshot(self) -> list[Any]:
        """Copies of the buffers; of one that was not written to since the last snapshot, the copy of then.

        Batch normalization writes to its averages without a new version, but counts in another buffer of the module.
        """
        buffers, versions = self._buffers(), dict.fromkeys(self.training, 0)
        for (module, _), b in zip(self.slots, buffers, strict=True):
            versions[module] += 0 if b is None else b._version
        now = [(b, versions[module]) for (module, _), b in zip(self.slots, buffers, strict=True)]
        copies = {(id(b), version): copy for (b, version), copy in zip(self._seen, self._copies, strict=True)}
        for b, version in now:
            if (id(b), version) not in copies:
                copies[id(b), version] = None if b is None else b.detach().clone()
        self._seen, self._copies = now, [copies[id(b), version] for b, version in now]
        return self._copies


def _has_moved(before: RandomState) -> bool:
    now = RandomState(before.device)
    pairs = (before.cpu, now.cpu), (before.own, now.own)
    return any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs)


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        if module.training is not training:
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
