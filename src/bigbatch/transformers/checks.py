"""What a trainer may be, looked at before it trains."""

from collections.abc import Mapping
from typing import Any

import transformers
from accelerate.utils import DistributedType
from torch import Tensor

from bigbatch import errors


def check_items(items: Any) -> Any:
    """Accepts a function of a micro-batch's inputs, or None."""
    if items is not None and not callable(items):
        raise TypeError(
            f"items must be a function from a micro-batch's inputs to a number or a tensor of one. "
            f"{errors.received('items', items)} Pass one such as lambda inputs: len(inputs['input_ids'])."
        )
    return items


def check_bases(cls: type, mixin: type) -> None:
    """Accepts a subclass in which the mix-in stands before every trainer, whose methods it overrides."""
    order = cls.__mro__
    before = [base.__name__ for base in order[: order.index(mixin)] if transformers.Trainer in base.__mro__[:1]]
    if before:
        raise TypeError(
            f"BigBatch must stand before the trainer, or nothing of it is reached. Received: class {cls.__name__}"
            f"({', '.join(base.__name__ for base in cls.__bases__)}). "
            "Write class MyTrainer(BigBatch, SFTTrainer)."
        )


def check_trainer(trainer: Any) -> None:
    """Accepts a trainer whose gradients PyTorch leaves in `.grad`, each of one backward at a time."""
    args, accelerator = trainer.args, trainer.accelerator
    kind, scaler = accelerator.distributed_type, accelerator.scaler
    optim = str(getattr(args.optim, "value", args.optim))
    parallel = accelerator.parallelism_config
    if trainer.is_deepspeed_enabled or kind == DistributedType.DEEPSPEED:
        raise _refused("DeepSpeed", "keeps the gradients in an engine of its own, and accumulates there", "Use FSDP2")
    if kind == DistributedType.XLA or accelerator.device.type == "xla":
        raise _refused("A TPU", "runs its own compiled step, of which bigbatch sees no gradient", "Use bigbatch.jax")
    if kind == DistributedType.MEGATRON_LM:
        raise _refused("Megatron-LM", "accumulates in a schedule of its own", "Use FSDP2")
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise _refused("FSDP 1", "keeps no gradient of a parameter's own", "Set fsdp_config={'version': 2}")
    if args.n_gpu > 1 and not trainer.is_model_parallel:
        raise _refused("DataParallel", "averages the losses of GPUs with unequal items", "Start it with torchrun")
    if parallel is not None and parallel.total_size > parallel.dp_replicate_size * parallel.dp_shard_size:
        raise _refused("Tensor, context or sequence parallelism", "cuts an example over ranks", "Use DDP or FSDP2")
    if optim in ("lomo", "adalomo") or optim.endswith("_layerwise"):
        raise _refused(f"optim={optim!r}", "steps in each backward, before the window is complete", "Use another")
    if accelerator.mixed_precision == "fp16" and not (accelerator.native_amp and _unscales(scaler)):
        raise _refused(
            "fp16 without a scaler that unscales", "loses small gradients to underflow", "Use bf16=True, or a GPU"
        )
    if accelerator.gradient_accumulation_steps != 1:
        steps = accelerator.gradient_accumulation_steps
        raise ValueError(
            f"The accelerator accumulates too. Received: gradient_accumulation_steps={steps} of the accelerator. "
            "Leave it out: with bigbatch as well it would accumulate twice."
        )


def _unscales(scaler: Any) -> bool:
    return scaler is not None and scaler.is_enabled() and callable(getattr(scaler, "unscale_", None))


def _refused(what: str, why: str, fix: str) -> ValueError:
    return ValueError(
        f"{what} {why}. bigbatch.transformers cannot be exact with it. {fix}, or train with the stock Trainer."
    )


def unexpected_every(every: Any) -> TypeError:
    """For the option of the other APIs, beside the trainer's own."""
    return TypeError(
        f"The trainer already says when a window closes. {errors.received('every', every)} "
        "Leave it out, and set gradient_accumulation_steps in the arguments."
    )


def items_not_found(trainer: Any, inputs: Mapping[str, Any], reason: str) -> ValueError:
    """For a loss that is the mean of nothing that can be counted."""
    name = type(trainer.accelerator.unwrap_model(trainer.model)).__name__
    shapes = {key: tuple(value.shape) for key, value in inputs.items() if isinstance(value, Tensor)}
    tried = (
        f"No experiment was possible ({reason})." if reason else "No count of examples, labels or masks explains it."
    )
    return ValueError(
        f"What the loss of {name} in {type(trainer).__name__} is the mean of could not be found. Received: inputs of "
        f"shapes {shapes}. {tried} Pass items=, a function from a micro-batch's inputs to the number of examples or "
        "tokens that its loss is the mean of. A loss that couples examples, as in-batch negatives do, or draws random "
        "numbers beside dropout may have none: see bb.chunked and bb.audit of bigbatch.torch."
    )


def check_router(trainer: Any) -> None:
    """Refuses a loss with a router's part that couples the tokens of a batch, unless the user gives the items."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, transformers.PretrainedConfig) else config
    if getattr(text, "output_router_logits", False) or getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "A router's auxiliary loss is no mean over tokens: it multiplies means over the whole batch, which no "
            f"micro-batch has. Received: output_router_logits=True of {type(model).__name__}. Set it to False; or pass "
            "items=, the tokens of the main loss, and the router's part is each micro-batch's own."
        )


def no_single_backward(trainer: Any, count: int) -> RuntimeError:
    """For a training step that does not call the accelerator's backward once."""
    return RuntimeError(
        f"A training step must call accelerator.backward once. Received: {count} calls in {type(trainer).__name__}. "
        "Leave training_step as it is and override compute_loss, with one loss. The window was dropped; the parameters "
        "and the optimizer are as they were."
    )


def step_without_window(trainer: Any, held: int, planned: int) -> RuntimeError:
    """For an optimizer's step before a window is complete."""
    return RuntimeError(
        f"The trainer steps before its window is complete. Received: {held} of {planned} micro-batches in "
        f"{type(trainer).__name__}. Call super().training_step where you override it. "
        "The parameters and the optimizer are as they were."
    )
