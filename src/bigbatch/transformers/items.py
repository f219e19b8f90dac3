"""The items of each micro-batch: as the user says, or as an experiment found for this model and loss."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigbatch.transformers import checks
from bigbatch.transformers.counts import SUM, candidates, has_no_labels
from bigbatch.transformers.experiments import at_rest, consistent, unlogged

NO_LABELS = "every label is left out"

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Any]
Loss = Callable[..., Any]
"""A trainer's compute_loss."""


class Found(NamedTuple):
    """What a loss is the mean of.

    Attributes:
        names: candidates that explain it. Several where nothing has told them apart so far.
        scaled: whether it is divided by the `num_items_in_batch` that it is given, of the whole window.
        counts: where nothing told several names apart at first, what rank 0's first micro-batch had of each. Items
            are multiples of it, so that they stay comparable when the names become fewer inside a window.
    """

    names: tuple[str, ...]
    scaled: bool = False
    counts: tuple[float, ...] = ()


class Items:
    """Finds the items of a trainer's micro-batches.

    Args:
        trainer: whose losses they are.
        given: the user's function from a micro-batch's inputs to its items, or None.
    """

    def __init__(self, trainer: Any, given: Callable[[Inputs], Any] | None):
        self.trainer, self.given = trainer, given
        self.found: dict[Any, Found] = {}

    def of(self, compute: Loss, model: Any, inputs: Inputs, total: Any) -> tuple[Any, bool, bool]:
        """Of one micro-batch.

        Args:
            compute: the trainer's compute_loss.
            model: the model that it is given.
            inputs: the micro-batch, as compute_loss gets it.
            total: the trainer's `num_items_in_batch` of the whole window.

        Returns:
            The items, or 1 where the loss is a sum; whether it is a sum; and whether it is given `total`.
        """
        if self.given is not None:
            return self.given(inputs), False, False
        kind = _kind(inputs)
        if kind not in self.found:
            found = self._find(compute, model, inputs, total)
            if found is None:
                return 0 * next(iter(candidates(inputs).values()))(inputs), False, False
            self.found[kind] = found
            logger.info("What the loss of %s is the mean of: %s.", kind[0], " or ".join(found.names))
        if len(self.found[kind].names) > 1:
            self.found[kind] = self._decide(self.found[kind], compute, model, inputs, total)
        names, scaled, counts = self.found[kind]
        items = candidates(inputs)[names[0]](inputs)
        return items / counts[0] if counts else items, names[0] == SUM, scaled

    def _find(self, compute: Loss, model: Any, inputs: Inputs, total: Any) -> Found | None:
        """What explains the loss, or None where every label is left out on every rank, and nothing shows it yet."""
        checks.check_router(self.trainer)
        # A loss function divides by the `num_items_in_batch` that it is given; a model may count its items otherwise.
        ways = [True, False] if self.trainer.compute_loss_func is not None else [False, True]
        reasons = []
        for scaled in ways if total is not None else [False]:
            allowed = [SUM] if scaled else list(candidates(inputs))
            names, reason = self._explaining(compute, model, inputs, allowed, total if scaled else None)
            if reason == NO_LABELS:
                return None
            if names and not (SUM in names and len(names) > 1):
                return Found(tuple(names), scaled, self._counts(names, inputs) if len(names) > 1 else ())
            reasons.append(reason)
        raise checks.items_not_found(self.trainer, inputs, next(filter(None, reasons), ""))

    def _decide(self, found: Found, compute: Loss, model: Any, inputs: Inputs, total: Any) -> Found:
        """While several candidates are left: goes on where it makes no difference which, and else looks again."""
        names, scaled, first = found
        if self._are_alike(names, inputs, first):
            return found
        left, _ = self._explaining(compute, model, inputs, names, total if scaled else None)
        first = tuple(count for name, count in zip(names, first, strict=True) if name in left)
        if not left or not self._are_alike(left, inputs, first):
            raise checks.items_not_found(self.trainer, inputs, "")
        return Found(tuple(left), scaled, first)

    def _are_alike(self, names: Any, inputs: Inputs, first: tuple[float, ...]) -> bool:
        """Whether the counts are in proportion to those in the first micro-batch: then any of them will do."""
        counts = [float(candidates(inputs)[name](inputs)) for name in names]
        alike = all(count * first[0] == counts[0] * at_first for count, at_first in zip(counts, first, strict=True))
        return _on_all_ranks(self.trainer, [alike])[0]

    def _counts(self, names: Any, inputs: Inputs) -> tuple[float, ...]:
        """Of rank 0, on every rank."""
        accelerator = self.trainer.accelerator
        counts = [float(candidates(inputs)[name](inputs)) for name in names]
        if accelerator.num_processes > 1:
            counts = accelerator.gather(torch.tensor([counts], device=accelerator.device))[0].tolist()
        return tuple(counts)

    def _explaining(self, compute: Loss, model: Any, inputs: Inputs, allowed: Any, total: Any) -> tuple[list[str], str]:
        """The candidates that explain the loss on every rank, or why nothing could be tried."""
        trainer = self.trainer
        # Without DistributedDataParallel, whose forward sends messages, and uncompiled, for shapes that come once.
        inner = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)

        def loss(part: dict[str, Any]) -> Tensor:
            with trainer.compute_loss_context_manager():
                return compute(inner, part, num_items_in_batch=total)

        with unlogged(trainer), at_rest(inner):
            trainer.current_gradient_accumulation_steps = 1  # which some losses are divided by
            names, reason = consistent(loss, inputs, allowed, coarse=_is_coarse(trainer, inner))
        empty = has_no_labels(inputs)
        fitting = _on_all_ranks(trainer, [empty or name in names for name in allowed])
        if _on_all_ranks(trainer, [empty])[0]:
            return [], NO_LABELS
        return [name for name, true in zip(allowed, fitting, strict=True) if true], reason


def _kind(inputs: Inputs) -> tuple[Any, ...]:
    """Inputs of one kind have one loss: a model may choose it by the labels' dtype, a trainer by the data set."""
    tensors = {key: (value.dtype, value.ndim) for key, value in inputs.items() if isinstance(value, Tensor)}
    return inputs.get("dataset_name") or "the micro-batches", frozenset(tensors.items())


def _on_all_ranks(trainer: Any, here: list[bool]) -> list[bool]:
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1 or not here:
        return here
    lines = accelerator.gather(torch.tensor([here], device=accelerator.device))
    return lines.all(dim=0).tolist()


def _is_coarse(trainer: Any, model: Any) -> bool:
    """Whether the loss comes from less than float32."""
    narrow = any(p.is_floating_point() and p.itemsize < 4 for p in model.parameters())
    return narrow or trainer.accelerator.mixed_precision != "no" or torch.get_float32_matmul_precision() != "highest"
