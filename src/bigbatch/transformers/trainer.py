"""`Trainer` and `BigBatch`: Hugging Face's training loop, with the full batch's own gradient in each step.

The loop stays transformers': it fetches, clips, steps, schedules, logs and saves. `training_step` is where it
differentiates a micro-batch, and there `bigbatch.torch.Gradients` takes it in. Subclasses' own training steps, such as
TRL's, are called: what they hand to `accelerator.backward` is handed to the window.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bigbatch.torch.gradients import Gradients
from bigbatch.transformers import checks
from bigbatch.transformers.items import Items

_Base = transformers.Trainer if TYPE_CHECKING else object  # the trainer comes after the mix-in


class BigBatch(_Base):
    """Makes a subclass of `transformers.Trainer` accumulate exactly.

    It stands before the trainer::

        class SFT(BigBatch, SFTTrainer): ...

    Arguments, callbacks, checkpoints and logs are the trainer's own. A step is made with the gradient that one batch of
    all `gradient_accumulation_steps` micro-batches would have: the mean over its items, on all ranks. `max_grad_norm`
    clips that; the logged `loss` and `grad_norm` are the window's. Where a data set of unknown length ends inside a
    window, the window is applied, as with a known one.

    Args:
        items: a function from a micro-batch's inputs, as the model gets them, to the items that its loss is the mean
            of: a number, or a tensor of one on the device. Left out, what the loss is the mean of is found by an
            experiment of nine forwards on the first micro-batch.

    Raises:
        TypeError, ValueError: when made, `items` is not such a function, or the trainer is one of those that hide
            gradients (DeepSpeed, TPUs, fp16 without a scaler that unscales); when the first micro-batch is seen, its
            loss does not tell what it is the mean of. Nothing was touched.

    An exception inside a window, of a callback for one, drops it. The host waits for the device once a window.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        checks.check_bases(cls, BigBatch)

    def __init__(self, *args: Any, items: Callable[[Mapping[str, Any]], float | Tensor] | None = None, **kwargs: Any):
        if "every" in kwargs:
            raise checks.unexpected_every(kwargs["every"])
        self._items = Items(self, checks.check_items(items))
        self._grads: Gradients | None = None
        self._differentiated: list[Tensor] = []  # the parameters of `_grads`
        self._planned = self._held = 0  # micro-batches of the open window
        super().__init__(*args, **kwargs)
        checks.check_trainer(self)
        self.add_callback(_Complete(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; an exception leaves no open window."""
        checks.check_trainer(self)
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._grads is not None and self._grads.pending:
                self._grads.reset()
            self._grads, self._planned, self._differentiated = None, 0, []

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of the next window, which begins here."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, items
        self._grads = self._opened()
        self._planned, self._held = len(batches), 0
        # The loop steps after so many micro-batches; of data that end before, it would leave the last ones out.
        return [_Absent()] * (num_batches - len(batches)) + batches, items

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch of the window. Returns the window's mean loss where it completes it, and else 0."""
        if isinstance(inputs, _Absent):
            return torch.zeros((), device=self.args.device)
        if self._grads is None:  # called by somebody else than the loop
            return super().training_step(model, inputs, num_items_in_batch)
        micro_batch = _MicroBatch(self, num_items_in_batch)
        with micro_batch.taken():
            super().training_step(model, inputs, num_items_in_batch)
        if micro_batch.backwards != 1:
            self._grads.reset()
            raise checks.no_single_backward(self, micro_batch.backwards)
        if micro_batch.update is None:
            return torch.zeros((), device=self.args.device)
        return torch.tensor(micro_batch.update.loss, device=self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """As the trainer's own; none for a micro-batch that is not there."""
        return 0 if isinstance(inputs, _Absent) else super().floating_point_ops(inputs)

    def _opened(self) -> Gradients:
        """What the window is accumulated in: the last one, where it is of the same parameters."""
        model: Any = self.model_wrapped
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads: Gradients | None = self._grads
        if grads is not None and grads.pending:
            grads.reset()
        if grads is None or list(map(id, self._differentiated)) != list(map(id, parameters)):
            ranks = self.accelerator.num_processes > 1 or isinstance(model, DistributedDataParallel)
            every, scaler = self.args.gradient_accumulation_steps, self.accelerator.scaler
            wrapped = model if ranks else None
            # The trainer takes the norm itself, to clip and to log it.
            grads = Gradients(parameters, every=every, model=wrapped, scaler=scaler, norm=False)
            self._differentiated = parameters
        return grads


class Trainer(BigBatch, transformers.Trainer):
    """`transformers.Trainer`, accumulating exactly. Its arguments, and `items` (see `BigBatch`)."""


class _MicroBatch:
    """One training step of the trainer, whose loss goes into the window."""

    def __init__(self, trainer: Any, total: Any):
        self.trainer, self.total = trainer, total
        self.items: Any = None
        self.factor = 1
        self.backwards, self.update = 0, None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, the trainer's loss is the micro-batch's own, and its accelerator's backward the window's."""
        trainer = self.trainer
        steps, own = trainer.current_gradient_accumulation_steps, trainer.loss_is_scaled_for_ga
        trainer.compute_loss = functools.partial(self._compute_loss, trainer.compute_loss)
        trainer.accelerator.backward = self._backward
        trainer.loss_is_scaled_for_ga = True
        try:
            yield
        finally:
            del trainer.compute_loss, trainer.accelerator.backward
            trainer.loss_is_scaled_for_ga, trainer.current_gradient_accumulation_steps = own, steps

    def _compute_loss(self, compute: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        trainer, steps = self.trainer, self.trainer._planned
        self.items, is_sum, scaled = trainer._items.of(compute, model, inputs, self.total)
        if is_sum:  # of all micro-batches, whose mean the window is
            self.factor = steps
            if scaled and not trainer.args.average_tokens_across_devices:
                self.items = self.total
            self.items = self.items / steps
        kwargs["num_items_in_batch"] = self.total if scaled else None
        # TRL divides some of its losses by this.
        trainer.current_gradient_accumulation_steps = steps if is_sum else 1
        return compute(model, inputs, *args, **kwargs)

    def _backward(self, loss: Tensor, **kwargs: Any) -> None:
        trainer = self.trainer
        self.backwards += 1
        if self.backwards > 1:
            raise checks.no_single_backward(trainer, self.backwards)
        last = trainer._held + 1 == trainer._planned
        self.update = trainer._grads.backward(
            loss if self.factor == 1 else loss * self.factor, items=self.items, last=last
        )
        trainer._held += 1


class _Complete(transformers.TrainerCallback):
    """Looks before each step of the optimizer whether its window is complete."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Refuses a step whose gradients did not go through the window."""
        trainer = self.trainer
        if trainer._held != trainer._planned:
            raise checks.step_without_window(trainer, trainer._held, trainer._planned)


class _Absent(dict[str, Any]):
    """Stands for a micro-batch that the data had no more of."""
