"""Weight gradients straight into the window's sums, without a temporary of the weight's size.

Autograd computes each weight's gradient into a new tensor and then adds that to `.grad`: one allocation and one pass
over the weights a micro-batch too many. Here `F.linear` and `F.embedding` of a leaf weight run as functions whose
backward adds the product to the sum itself (`addmm_`, `index_add_`), as Megatron-LM's gradient accumulation fusion
does. A `TorchFunctionMode` around the forward is the way in, so no module is touched and nothing has to be given back.

The weight stays an input of the function, so the graph is the one that autograd would have built: a second use of the
weight elsewhere, module hooks and checkpointing find what they expect. Outside the window's own backward, and with
`create_graph`, the functions return ordinary gradients.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from bigbatch.torch.window import Window

log = logging.getLogger(__name__)

# Numbers in a weight. Below this the function's Python costs more than the pass it saves (`benchmarks/pytorch.md`).
SMALLEST = 1 << 17


class Fused(TorchFunctionMode):
    """While entered, `F.linear` and `F.embedding` add their weights' gradients straight into the window's sums.

    It stays entered during the backward too: checkpointing runs the forward again there and must meet the same
    functions. Why a weight is left to autograd is logged at DEBUG, once for each reason and shape.

    Attributes:
        window: where the gradients go while the window's own backward runs; None outside it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window: Window | None = None
        self._logged: set[tuple[str, torch.Size]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # Dynamo traces into modes, and shall find nothing but the call
            return func(*args, **(kwargs or {}))
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        if func is F.embedding:
            return self._embedding(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        reason = _reason(weight, input)
        if not self._takes(weight, reason):
            return F.linear(input, weight, bias)
        device = input.device.type
        if torch.is_autocast_enabled(device):
            # Cast out here: inside the function, where there is no grad mode, autocast would cast the weight without a
            # gradient and keep that cast for the weight's next use.
            dtype = torch.get_autocast_dtype(device)
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
            return _Linear.apply(input, weight, bias, dtype, self)
        return _Linear.apply(input, weight, bias, weight.dtype, self)

    def _embedding(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **options: Any):
        scarce = any(args[i] for i in (0, 2, 3) if i < len(args)) or any(
            options.get(name) for name in ("max_norm", "scale_grad_by_freq", "sparse")
        )
        reason = "max_norm, scale_grad_by_freq and sparse are autograd's" if scarce else _reason(weight, input)
        if not self._takes(weight, reason):
            return F.embedding(input, weight, padding_idx, *args, **options)
        return _Embedding.apply(input, weight, padding_idx, self)

    def backward(self, loss: Tensor, gradient: Tensor | None, window: "Window") -> None:
        """`loss.backward(gradient)`, with the weights' gradients added to the window's sums."""
        self.window = window
        try:
            with self:
                # Not loss.backward(): that is one call to a mode, which is left while the call lasts, and checkpointing
                # would run the forward again without it. The engine is below what modes see.
                engine = torch.autograd.Variable._execution_engine
                gradient = torch.ones_like(loss) if gradient is None else gradient
                engine.run_backward(
                    (loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        finally:
            self.window = None

    def _takes(self, weight: Tensor, reason: str | None) -> bool:
        if reason and (reason, weight.shape) not in self._logged:
            self._logged.add((reason, weight.shape))
            log.debug("The gradient of a weight of shape %s is left to autograd: %s.", tuple(weight.shape), reason)
        return reason is None


def _reason(weight: Tensor, input: Tensor) -> str | None:
    """Why this weight's gradient is left to autograd; None where it can go straight into the sums."""
    if not weight.requires_grad or not torch.is_grad_enabled():
        return "it needs none here"
    if weight.numel() < SMALLEST:
        return f"it has fewer than {SMALLEST} numbers, which are added faster than asked for"
    if type(weight) not in (Tensor, torch.nn.Parameter) or type(input) is not Tensor:
        return "tensor subclasses have their own products"
    if not weight.is_leaf:
        return "it is computed from other tensors, as by a parametrization"
    if weight.layout != torch.strided or not weight.is_contiguous() or weight.ndim != 2 or input.ndim == 0:
        return "its layout is not that of a matrix, row by row"
    if not weight.is_floating_point():
        return "it is complex"
    # No public name says these three; tests fail when they move.
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:  # pyright: ignore[reportAttributeAccessIssue]
        return "it has hooks, which must see each gradient"
    if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return "torch.func transforms the forward"
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None and ddp.require_backward_grad_sync:
        return "DistributedDataParallel reduces this micro-batch, and waits for each gradient"
    return None


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, computed in `dtype`; its backward adds dW = dyᵀ x to the window's sum."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, fused: Fused
    ) -> Tensor:
        ctx.fused, ctx.weight = fused, weight
        cast = weight.to(dtype)
        ctx.save_for_backward(input, cast if ctx.needs_input_grad[0] else None)
        return F.linear(input, cast, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        input, cast = ctx.saved_tensors  # here checkpointing runs the forward again
        with torch._C.DisableTorchFunction():
            to_input = None if cast is None else grad.matmul(cast)
            if grad.ndim != 2:
                grad, input = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
            to_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
            window = _open(ctx)
            place = None if window is None else window.in_place(ctx.weight, grad.dtype)
            if place is not None:
                total, weight = place
                total.addmm_(grad.t(), input, alpha=weight)
                return to_input, None, to_bias, None, None
            return to_input, _added(ctx.weight, grad.t().mm(input), window), to_bias, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a table; its backward adds each row's gradient to that row of the window's sum."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, padding_idx: int | None, fused: Fused) -> Tensor:
        ctx.fused, ctx.weight = fused, weight
        ctx.padding = -1 if padding_idx is None else padding_idx % len(weight)
        ctx.save_for_backward(input)
        return F.embedding(input, weight, padding_idx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        (input,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            window = _open(ctx)
            place = None if window is None else window.in_place(ctx.weight, grad.dtype)
            if place is not None:
                total, weight = place
                if ctx.padding >= 0:
                    grad = grad.masked_fill((input == ctx.padding).unsqueeze(-1), 0)
                total.index_add_(0, input.reshape(-1), grad.reshape(-1, grad.shape[-1]), alpha=weight)
                return None, None, None, None
            table = torch.ops.aten.embedding_dense_backward(grad, input, len(ctx.weight), ctx.padding, False)
            return None, _added(ctx.weight, table, window), None, None


def _open(ctx: Any) -> "Window | None":
    """The window whose backward this is; None in a backward of the user's own, or where it will be differentiated."""
    return None if torch.is_grad_enabled() else ctx.fused.window


def _added(weight: Tensor, gradient: Tensor, window: "Window | None") -> Tensor | None:
    """Adds a whole gradient to the window's sum; without a window it is autograd's, and returned."""
    if window is None:
        return gradient.to(weight.dtype)
    window.add(weight, gradient)
    return None
