"""A loss over the whole batch on the PyTorch backend: two loops over its micro-batches, one `optimizer.apply`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import torch

from bigbatch import errors
from bigbatch.engines.torch_dtypes import gradient_dtype
from bigbatch.keras import batch, whole_batch
from bigbatch.keras.backends.torch.guard import GradientGuard
from bigbatch.keras.backends.torch.window import apply, cut, drain, fused
from bigbatch.keras.guard import guarded


class Start(NamedTuple):
    """What a micro-batch's first run started from."""

    values: list[torch.Tensor]  # of the variables that a forward pass may write to
    random: list[torch.Tensor]  # PyTorch's own states, on the CPU and on the device; they go on between the runs
    buffers: list[torch.Tensor]  # copies of those of PyTorch's own modules


def split_step(model: Any, micro_batch: int) -> Callable[[Any], dict[str, Any]]:
    """`train_step` for a whole batch."""
    known = fused and fused.Known()

    def train_step(data: Any) -> dict[str, Any]:
        try:
            return _Step(model, data, cut(data, micro_batch), known).run()
        finally:
            model.zero_grad()

    return train_step


class _Step:
    """One update."""

    def __init__(self, model: Any, data: Any, micro_batches: list[Any], known: Any):
        self.model, self.data, self.micro_batches = model, data, micro_batches
        self.parameters = [v.value for v in model.trainable_variables]
        self.state = whole_batch.state_of(model)
        self.buffers = list(model.buffers())
        self.length = len(batch.leaves(data)[0])
        narrow = any(gradient_dtype(p).itemsize < 4 for p in self.parameters)
        several = len(micro_batches) > 1 and not narrow
        self.fused = fused.FusedPath(known).window(self.parameters) if fused is not None and several else None
        self.sums: dict[torch.Tensor, torch.Tensor] | None = {} if narrow else None

    def run(self) -> dict[str, Any]:
        """Both loops, the loss between them, and the update."""
        model = self.model
        model.zero_grad()
        with guarded(model, adds_up=len(self.micro_batches) > 1):
            guard = GradientGuard(self.parameters, len(self.micro_batches) > 1)
            with torch.no_grad():
                y_pred, added = self._first_runs()
            guard.check()
            loss, cotangents, direct = self._loss(y_pred, added)
            guard.check()
            with self._at_the_end():
                for i in range(len(self.micro_batches)):
                    self._second_run(i, cotangents)
                    guard.note()
            guard.check()
        with torch.no_grad():
            gradients = self._gradients(direct)
            if self.parameters:
                apply(model, gradients, loss, [])
            return whole_batch.logs_of(model, self.data, y_pred, loss, self.length)

    def _first_runs(self) -> tuple[Any, list[Any]]:
        """The whole batch's outputs, and the means of the losses that are added; the variables move."""
        values = [v.value for v in self.state]
        self.starts: list[Start] = []
        parts: list[Any] = []
        sums: list[Any] = []
        made: Any = None
        for data in self.micro_batches:
            self.starts.append(Start(values, _random(self.parameters), [b.clone() for b in self.buffers]))
            made = self._forward(data, values)
            values, n = made.state, len(batch.leaves(data)[0])
            parts.append(made.arrays)
            sums.append([added * (n / self.length) for added in made.added])
        for k, (v, value) in enumerate(zip(self.state, values, strict=True)):
            own = v.value
            if value is not own:
                before = own.clone()  # which assign is about to write to
                for start in self.starts:
                    start.values[k] = before if start.values[k] is own else start.values[k]
                v.assign(value)
        joined = [torch.cat(ys) if len(ys) > 1 else ys[0] for ys in map(list, zip(*parts, strict=True))]
        return whole_batch.joined(made, joined), [sum(of_one[1:], of_one[0]) for of_one in zip(*sums, strict=True)]

    def _forward(self, data: Any, values: list[torch.Tensor]) -> whole_batch.Forward:
        x, _, _ = batch.unpack(data)
        return whole_batch.forward(self.model, x, list(zip(self.state, values, strict=True)), self.state)

    def _loss(self, y_pred: Any, added: list[Any]) -> tuple[Any, Any, Any]:
        """The loss; its gradients of the outputs and the added losses; and of the parameters that it reads itself."""
        outputs = keras.tree.flatten(y_pred)
        sources = [y for y in outputs if y.is_floating_point()] + added
        for one in sources:
            one.requires_grad_()
        loss = whole_batch.loss_of(self.model, self.data, y_pred, added)
        if not loss.requires_grad:
            raise errors.loss_without_gradient(loss)
        found = torch.autograd.grad(
            self.model.optimizer.scale_loss(loss), [*sources, *self.parameters], allow_unused=True
        )
        for one in sources:
            one.requires_grad_(False)
        floating = iter(found[: len(sources) - len(added)])
        of_outputs = [next(floating) if y.is_floating_point() else None for y in outputs]
        return loss.detach(), (of_outputs, found[len(sources) - len(added) : len(sources)]), found[len(sources) :]

    def _second_run(self, i: int, cotangents: Any) -> None:
        """Adds a micro-batch's gradients up: of a scalar whose gradient with respect to its outputs is the loss's."""
        data, start = self.micro_batches[i], self.starts[i]
        _restore(self.parameters, start.random)
        with torch.no_grad():
            for b, value in zip(self.buffers, start.buffers, strict=True):
                b.copy_(value)
        made = self._forward(data, start.values)
        n = len(batch.leaves(data)[0])
        at = sum(len(batch.leaves(before)[0]) for before in self.micro_batches[:i])
        outputs, added = cotangents
        pairs = [(y, g[at : at + n]) for y, g in zip(made.arrays, outputs, strict=False) if g is not None]
        pairs += [(y, g * (n / self.length)) for y, g in zip(made.added, added, strict=True) if g is not None]
        terms = [(y * g).sum() for y, g in pairs if y.requires_grad]
        if not terms:
            return
        surrogate: Any = sum(terms[1:], terms[0])
        if self.fused is not None:
            self.fused.backward(surrogate, torch.ones_like(surrogate))
        else:
            surrogate.backward()
        if self.sums is not None:
            drain(self.parameters, self.sums)

    @contextlib.contextmanager
    def _at_the_end(self) -> Iterator[None]:
        """Afterwards PyTorch's random states and buffers are those that the first runs have left."""
        random, buffers = _random(self.parameters), [b.clone() for b in self.buffers]
        try:
            yield
        finally:
            _restore(self.parameters, random)
            with torch.no_grad():
                for b, value in zip(self.buffers, buffers, strict=True):
                    b.copy_(value)

    def _gradients(self, direct: Any) -> list[torch.Tensor | None]:
        if self.fused is not None:
            self.fused.flush()
        sums = [p.grad if self.sums is None else self.sums.get(p) for p in self.parameters]
        both = [[g for g in pair if g is not None] for pair in zip(sums, direct, strict=True)]
        return [
            sum(parts[1:], parts[0]).to(gradient_dtype(p)) if parts else None
            for p, parts in zip(self.parameters, both, strict=True)
        ]


def _random(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    device = _device(parameters)
    return [torch.get_rng_state(), *([] if device is None else [getattr(torch, device.type).get_rng_state(device)])]


def _restore(parameters: list[torch.Tensor], states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        device: Any = _device(parameters)
        getattr(torch, device.type).set_rng_state(state, device)


def _device(parameters: list[torch.Tensor]) -> torch.device | None:
    """The accelerator that the model is on, which has a random state of its own."""
    return next((p.device for p in parameters if p.device.type != "cpu"), None)
