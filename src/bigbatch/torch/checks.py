"""What the doors are given, looked at before anything moves."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bigbatch import errors
from bigbatch.torch.window import exact


def check_loss(loss: Any) -> Tensor:
    """Accepts a real scalar tensor that autograd can differentiate."""
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise errors.loss_not_scalar(loss)
    if not loss.requires_grad:
        raise errors.loss_without_gradient(loss)
    return loss


def check_items(items: Any) -> float | Tensor:
    """Accepts a number above zero, or a tensor of one element; reading that one would make the host wait."""
    if not isinstance(items, Tensor):
        return errors.check_items(items)
    if items.numel() != 1 or items.is_complex() or items.dtype == torch.bool:
        errors.check_items(items)  # says what a number is
    # A sum of bf16 counts would stop at 256, and int / int would be float32.
    return items.detach().reshape(()).to(exact(items.device))


def check_optimizer(optimizer: Any) -> Optimizer:
    """Accepts a torch.optim.Optimizer that steps without a closure."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer. {errors.received('optimizer', optimizer)} "
            "Pass the optimizer itself, such as torch.optim.AdamW(model.parameters())."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss again inside its step (a required closure), "
            "and a window's micro-batches are gone by then. Use an optimizer whose step needs no closure."
        )
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError("The optimizer has no parameters. Pass it model.parameters() before making the Accumulator.")
    return optimizer


def check_scheduler(scheduler: Any) -> Any:
    """Accepts what can be stepped without a metric, or None."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau needs a metric that an update does not have. "
            "Leave it out, and call scheduler.step(metric) where you validate."
        )
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"scheduler must have a step method. {errors.received('scheduler', scheduler)}")
    return scheduler
