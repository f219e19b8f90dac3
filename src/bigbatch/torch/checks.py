"""What the APIs are given, looked at before anything moves."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bigbatch import errors
from bigbatch.engines.torch_dtypes import exact
from bigbatch.torch.optimizers import Optimizers, Schedulers


def check_loss(loss: Any) -> Tensor:
    """Accepts a real scalar tensor that autograd can differentiate, or a model's output that has one as `.loss`."""
    if not isinstance(loss, Tensor) and hasattr(loss, "loss"):
        loss = loss.loss
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise errors.loss_not_scalar(loss)
    if not loss.requires_grad:
        raise errors.loss_without_gradient(loss)
    return loss


def check_items(items: Any) -> float | Tensor:
    """Accepts a number above zero, or a tensor of one element; reading that one would make the host wait.

    A count in it that is none (negative, NaN or infinite) makes the window's items NaN or infinite, which is seen when
    the window closes.
    """
    if not isinstance(items, Tensor):
        return errors.check_items(items)
    if items.numel() != 1 or items.is_complex() or items.dtype == torch.bool:
        errors.check_items(items)  # says what a number is
    # A sum of bf16 counts would stop at 256, and int / int would be float32.
    items = items.detach().reshape(()).to(exact(items.device))
    # Negative ones become NaN, in one kernel. The threshold is below zero, and no denormal in float32.
    return torch.threshold(items, -1e-30, math.nan)


def check_dtype(dtype: Any) -> torch.dtype | None:
    """Accepts a floating dtype to accumulate in, or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        raise kind(
            f"dtype must be a floating torch.dtype or None. {errors.received('dtype', dtype)} "
            "Pass torch.float32 or torch.float64, or None to accumulate in the parameters' own."
        )
    return dtype


def check_flag(name: str, value: Any) -> bool:
    """Accepts True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False. {errors.received(name, value)}")
    return value


def check_parameters(parameters: Any) -> Any:
    """Accepts tensors, which become a list of each once; or what `check_optimizer` accepts, as that returns it."""
    fix = "Pass model.parameters(), or the optimizer."
    if isinstance(parameters, Optimizer):
        return check_optimizer(parameters)
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be tensors. {errors.received('parameters', parameters)} {fix}")
    given = list(dict.fromkeys(parameters) if not isinstance(parameters, Mapping) else parameters.values())
    if given and all(isinstance(one, Optimizer) for one in given):
        return check_optimizer(given)
    if strange := [one for one in given if not isinstance(one, Tensor)]:
        raise TypeError(f"parameters must be tensors. {errors.received('one of them', strange[0])} {fix}")
    if inner := [p for p in given if not p.is_leaf]:
        raise ValueError(
            f"parameters must be leaves, which autograd gives a .grad. {errors.received('one of them', inner[0])} {fix}"
        )
    if not given:
        raise ValueError(f"There are no parameters. An iterator that was used before is empty. {fix}")
    return given


def check_optimizer(optimizer: Any) -> Any:
    """Accepts an optimizer that steps without a closure, or a list of such, without a parameter in common."""
    if not isinstance(optimizer, list | tuple):
        return _check_one(optimizer)
    optimizers = Optimizers(_check_one(one) for one in optimizer)
    parameters = [p for group in optimizers.param_groups for p in group["params"]]
    if not parameters or len({id(p) for p in parameters}) != len(parameters):
        raise ValueError(
            f"Optimizers of one update share no parameter. Received: {len(optimizers.optimizers)} optimizers "
            f"({optimizers}) of {len(parameters)} parameters, {len({id(p) for p in parameters})} of them different. "
            "Give each its own part of the model's parameters."
        )
    return optimizers


def _check_one(optimizer: Any) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer. {errors.received('optimizer', optimizer)} "
            "Pass the optimizer itself, such as torch.optim.AdamW(model.parameters()), or a list of several."
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        # Accelerate's: between its own accumulations step() and zero_grad() do nothing.
        raise ValueError(
            f"{type(optimizer).__name__} wraps an optimizer, and steps when its trainer says so. "
            "Pass the optimizer itself (Accelerate: optimizer.optimizer, and accelerator.scaler as scaler)."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss again inside its step (a required closure), "
            "and a window's micro-batches are gone by then. Use bb.backward inside the closure: "
            "optimizer.step(closure), where closure() is zero_grad() and return bb.backward(loss_fn, batch, ...)."
        )
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError("The optimizer has no parameters. Pass it model.parameters() before making the Accumulator.")
    return optimizer


def check_scheduler(scheduler: Any, parameters: list[Tensor]) -> Any:
    """Accepts what can be stepped without an argument and is of these parameters, a list of such, or None."""
    if isinstance(scheduler, list | tuple):
        return Schedulers(_check_scheduler(one, parameters) for one in scheduler)
    return None if scheduler is None else _check_scheduler(scheduler, parameters)


def _check_scheduler(scheduler: Any, parameters: list[Tensor]) -> Any:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau needs a metric that an update does not have. "
            "Leave it out, and call scheduler.step(metric) where you validate."
        )
    step = getattr(scheduler, "step", None)
    if not callable(step):
        raise TypeError(f"scheduler must have a step method. {errors.received('scheduler', scheduler)}")
    kind = type(scheduler).__name__
    if needed := _needed(step):
        raise ValueError(
            "scheduler.step must need no argument, since it is called once an update. "
            f"Received: {kind}.step({', '.join(needed)}). Leave it out, and call it yourself where you have the "
            "argument, such as after an epoch."
        )
    if hasattr(scheduler, "optimizers") and hasattr(scheduler, "step_with_optimizer"):
        raise ValueError(
            f"{kind} steps when Accelerate says so, and once for each process. Pass what it wraps: scheduler.scheduler."
        )
    of = getattr(scheduler, "optimizer", None)
    ours = set(map(id, parameters))
    if isinstance(of, Optimizer) and not any(id(p) in ours for group in of.param_groups for p in group["params"]):
        raise ValueError(
            f"scheduler must be of the optimizer that is given. Received: {kind} of another {type(of).__name__}. "
            "It would have no effect on this one."
        )
    return scheduler


def _needed(step: Any) -> list[str]:
    """The arguments that it cannot be called without."""
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):  # compiled
        return []
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variable]


def check_scaler(scaler: Any, nonfinite: str = "skip") -> Any:
    """Accepts a GradScaler, or what has its methods, or None."""
    if scaler is None:
        return None
    missing = [name for name in ("scale", "unscale_", "step", "update") if not callable(getattr(scaler, name, None))]
    if missing:
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler. {errors.received('scaler', scaler)} "
            f"It has no {' and no '.join(missing)}. Pass the GradScaler itself; timm's NativeScaler, for one, wraps it."
        )
    if nonfinite == "apply" and getattr(scaler, "is_enabled", lambda: True)():
        raise ValueError(
            'nonfinite="apply" has no effect with a scaler, which never steps with inf or NaN. '
            f"{errors.received('nonfinite', nonfinite)} Leave one of them out."
        )
    return scaler
