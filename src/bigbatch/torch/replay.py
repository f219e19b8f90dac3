"""Running a function once more as it ran before: its random state, its autocast, its modules' modes and buffers.

The second run works on stand-ins for the modules' parameters and on copies of their buffers. So no hook on a parameter
is called, no `.grad` is touched, and a buffer that the function writes to changes once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
        # A cached cast would belong to the graph of one piece.
        self.autocast = [
            functools.partial(
                torch.autocast,
                kind,
                torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=False,
            )
            for kind in sorted({"cpu", device.type})
        ]
        self._seen: list[tuple[Tensor, int]] = []
        self._copies: list[Tensor] = []

    def parameters(self) -> dict[str, Tensor]:
        """The modules' parameters that need a gradient, each once."""
        return {name: p for name, p in self.holder.named_parameters() if p.requires_grad}

    def replaced(self, stand_ins: dict[str, Tensor], work: Callable[[], Result]) -> Result:
        """What `work` returns, which finds other tensors in the place of parameters."""
        return functional_call(self.holder, stand_ins, (work,))

    def run(self, args: Any, kwargs: Any) -> tuple[Any, Moment]:
        """Runs the function, which draws and writes to buffers as a call does, and what a second run starts from."""
        random, buffers = RandomState(self.device), self.buffers()
        result = self._called(args, kwargs)
        after = self.buffers()
        writes = any(a is not b for a, b in zip(buffers, after, strict=True))
        return result, Moment(random if random.moved() else None, buffers, writes)

    def again(self, moment: Moment, args: Any, kwargs: Any) -> Any:
        """Runs the function from a moment, and leaves all else as it was."""
        random = RandomState(self.device) if moment.random else None
        modes = {module: module.training for module in self.training}
        buffers = [getattr(module, name) for module, name in self.slots]
        copies = {id(b): b.clone() if moment.writes else b for b in moment.buffers}  # tied ones stay so
        try:
            if moment.random:
                moment.random.restore()
            self._set_modes(self.training)
            self._set_buffers([copies[id(b)] for b in moment.buffers])
            return self._called(args, kwargs)
        finally:
            self._set_buffers(buffers)
            self._set_modes(modes)
            if random:
                random.restore()

    def buffers(self) -> list[Tensor]:
        """Copies of the buffers as they are: the copies of before, but where one was written to since."""
        now = [getattr(module, name) for module, name in self.slots]
        seen = [(b, b._version) for b in now]
        if len(self._seen) != len(seen) or any(
            a is not b or v != w for (a, v), (b, w) in zip(self._seen, seen, strict=True)
        ):
            before = {id(b): (v, c) for (b, v), c in zip(self._seen, self._copies, strict=True)}
            copies: dict[int, Tensor] = {}
            for b, version in seen:
                unchanged = id(b) in before and before[id(b)][0] == version
                if id(b) not in copies:
                    copies[id(b)] = before[id(b)][1] if unchanged else b.detach().clone()
            self._seen, self._copies = seen, [copies[id(b)] for b in now]
        return self._copies

    def restore_buffers(self, copies: list[Tensor]) -> None:
        """Sets the buffers to what they were when `buffers` returned these copies."""
