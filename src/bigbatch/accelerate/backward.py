"""Exact accumulation under `accelerator.accumulate`, whose `sync_gradients` says when a window closes.

`accelerator.backward` divides every loss by the number of micro-batches planned. That is the mean only where all hold
as many items, and there are as many of them.
"""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from bigbatch import errors
from bigbatch.torch.gradients import Gradients
from bigbatch.torch.update import Update

_REFUSED = {
    DistributedType.DEEPSPEED: "DeepSpeed keeps the gradients, and accumulates and steps itself",
    DistributedType.MEGATRON_LM: "Megatron-LM runs the backward itself",
    DistributedType.XLA: "XLA adds up over the ranks inside the step",
}


def backward(accelerator: Accelerator, loss: Tensor, *, items: float | Tensor) -> Update | None:
    """Takes the place of `accelerator.backward(loss)` under `accelerator.accumulate`.

    Everything else of the loop stays::

        for x, y in loader:
            with accelerator.accumulate(model):
                bb.backward(accelerator, loss_fn(model(x), y), items=len(x))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    Where `accelerator.sync_gradients` is set, the mean gradient over all items of the window, of all processes, then
    lies in `.grad`, as `bigbatch.torch.Gradients` leaves it; under fp16 scaled once, as Accelerate expects.

    Args:
        accelerator: it has prepared the model and the optimizer, or several that one loss trains.
        loss: the micro-batch's mean loss, not divided by anything.
        items: what the mean is over, as for `bigbatch.torch.Accumulator.backward`.

    Returns:
        What the window came to where it closed, else None: `loss` and `grad_norm` are the mean's.

    Raises:
        TypeError, ValueError: the loss or its items are not as described, no optimizer was prepared, or the gradients
            are DeepSpeed's, Megatron-LM's or an XLA device's. The window stays as it was.
        RuntimeError: other code has changed the window's gradients or parameters, or a micro-batch has two losses; the
            window was dropped.

    The host waits for the device when the window closes. Accelerate's `even_batches`, which is on by itself, repeats
    examples so that every process has as many; `DataLoaderConfiguration(even_batches=False)` and `flush` count each
    example once.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an Accelerator. {errors.received('accelerator', accelerator)}")
    window = _window_of(accelerator)
    return window.backward(accelerator, loss, items)


def flush(accelerator: Accelerator) -> Update | None:
    """At the end of the data: closes the windows that other processes still have, one a call.

    Where processes have unequally many micro-batches (`even_batches=False`), call it on all of them after the loop::

        while bb.flush(accelerator):
            optimizer.step()
            optimizer.zero_grad()

    Returns:
        What the window came to, or None where no process has one.
    """
    window = _window_of(accelerator)
    window.stepped = False
    return window.gradients.flush()


class _Window:
    """What one Accelerator accumulates, for the models and optimizers that it has prepared so far."""

    def __init__(self, accelerator: Accelerator):
        kind = accelerator.distributed_type
        if kind in _REFUSED:
            raise ValueError(
                f"bigbatch needs the gradients in .grad, and {_REFUSED[kind]}. {errors.received('accelerator', kind)} "
                "Use DistributedDataParallel or FSDP2."
            )
        # No public name lists what was prepared: tests/trainers/test_accelerate.py.
        self.models, prepared = tuple(accelerator._models), tuple(accelerator._optimizers)
        if not prepared:
            raise ValueError(
                "The accelerator has prepared no optimizer. Pass model and optimizer to accelerator.prepare together."
            )
        self.prepared, self.stepped = prepared, True
        optimizers = [one.optimizer for one in prepared]
        models = _replicas_of(optimizers) if accelerator.num_processes > 1 else []
        models = models or list(self.models)
        model = None if not models else models[0] if len(models) == 1 else torch.nn.ModuleList(models)
        self.gradients = Gradients(optimizers, model=model, scaler=accelerator.scaler)
        mark = _marking(weakref.ref(self))
        self._handles = [one.register_step_post_hook(mark) for one in optimizers]

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()

    def is_of(self, accelerator: Accelerator) -> bool:
        """Whether these are still the models and optimizers that it has prepared."""
        now = (*accelerator._models, *accelerator._optimizers)
        then = (*self.models, *self.prepared)
        return len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))

    def backward(self, accelerator: Accelerator, loss: Tensor, items: float | Tensor) -> Update | None:
        """One micro-batch."""
        grads, last = self.gradients, accelerator.sync_gradients
        if grads.pending == 0:
            grads.every = accelerator.gradient_accumulation_steps
            if not self.stepped and any(p.grad is not None for p in grads._parameters()):
                raise _two_losses("the last window's mean, which no step has used, still lies in .grad")
        elif grads.pending + 1 == grads.every and not last:
            grads.reset()
            raise _two_losses(f"{grads.every} losses before accelerator.sync_gradients")
        update = grads.backward(loss, items=items, last=last)
        self.stepped = self.stepped and update is None
        return update


def _replicas_of(optimizers: Sequence[Optimizer]) -> list[Any]:
    """The DistributedDataParallel models whose parameters these train.

    Accelerate lists the models that it wraps, and not what it has wrapped them in. Only the garbage collector knows.
    """
    ours = {id(p) for one in optimizers for group in one.param_groups for p in group["params"]}
    gc.collect()
    living = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    found = [model for model in living if not ours.isdisjoint(map(id, model.parameters()))]
    parameters = [id(p) for model in found for p in model.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError(
            f"Parameters are in several DistributedDataParallel models. Received: {len(found)} models. "
            "Prepare a model once, and delete the old one before it is prepared again."
        )
    return found


def _two_losses(seen: str) -> RuntimeError:
    return RuntimeError(
        f"A micro-batch has one loss and one step. Seen: {seen}. Add a micro-batch's losses up and call backward once "
        "inside accelerator.accumulate; where a window's step is left out on purpose, call optimizer.zero_grad()."
    )


def _marking(window: "weakref.ref[_Window]") -> Any:
    def mark(*_: Any) -> None:
        if (living := window()) is not None:
            living.stepped = True

    return mark


_WINDOWS: "weakref.WeakKeyDictionary[Accelerator, _Window]" = weakref.WeakKeyDictionary()


def _window_of(accelerator: Accelerator) -> _Window:
    window = _WINDOWS.get(accelerator)
    if window is None or not window.is_of(accelerator):
        window = _WINDOWS[accelerator] = _Window(accelerator)
    return window
