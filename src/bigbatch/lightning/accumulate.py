"""Exact accumulation in Lightning's automatic optimization, as a callback.

Lightning divides every loss by `accumulate_grad_batches`, and runs a window's last backward inside of
`optimizer.step(closure)`. While a training runs, two methods of its strategy are others here: `backward`, which takes
the micro-batch in, and `optimizer_step`, which calls the closure before the step. It is Lightning that decides whether
a step follows, and so whether a micro-batch is its window's last.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from bigbatch import errors
from bigbatch.torch.batch import leaves
from bigbatch.torch.gradients import Gradients
from bigbatch.torch.update import Update


class Accumulate(pl.Callback):
    """Makes `accumulate_grad_batches` the update of the whole batch: the mean over all items of a window.

    Everything else of the Trainer and the module stays: `gradient_clip_val`, schedulers, precision, logging::

        trainer = pl.Trainer(accumulate_grad_batches=8, callbacks=[Accumulate(items=lambda batch: len(batch[0]))])
        trainer.fit(model, loader)

    Args:
        items: a function of the batch, as `training_step` is given it, that returns what its loss is the mean of: a
            number, or a tensor of one element on the device, such as `bb.causal_items(batch["labels"])`. Left out,
            the loss is the mean over the leading dimension.

    Attributes:
        update: what the last window came to, or None before the first: its `loss` and `grad_norm` are the mean's.

    Works with automatic optimization of one optimizer, in one process, under DDPStrategy and where the module's
    `configure_model` calls `fully_shard` (ModelParallelStrategy). A window that is open where training ends is dropped
    with a warning. A checkpoint inside a window holds it, in one process.

    Raises:
        TypeError: `items` is not callable.
        ValueError: when training starts: manual optimization, several optimizers, a module with a `backward` of its
            own, or a strategy that keeps the gradients (DeepSpeed, FSDP1, XLA).
    """

    def __init__(self, items: Callable[[Any], float | Tensor] | None = None):
        if items is not None and not callable(items):
            raise TypeError(
                f"items must be a function of the batch. {errors.received('items', items)} "
                "Pass what returns the number of examples or tokens that the batch's loss is the mean of."
            )
        self.items = items
        self.update: Update | None = None
        self._gradients: Any = None  # a Gradients, while training runs
        self._trainer: Any = None
        self._batch: Any = None
        self._stepping = False
        self._saved: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the place of the strategy's backward, for as long as training runs."""
        _check(trainer, pl_module)
        strategy: Any = trainer.strategy
        self._gradients = Gradients(
            trainer.optimizers[0], model=strategy.model, scaler=getattr(strategy.precision_plugin, "scaler", None)
        )
        if self._saved:
            self._gradients.every = trainer.accumulate_grad_batches
            self._gradients.load_state_dict(self._saved)
            self._saved = None
        strategy.backward = self._backward
        strategy.optimizer_step = partial(self._optimizer_step, strategy.optimizer_step)
        self._trainer = trainer

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch until its loss is known."""
        self._batch = batch

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drops a window that was not closed."""
        if self._gradients is not None and self._gradients.pending:
            rank_zero_warn(
                f"Training ended inside a window, and its {self._gradients.pending} micro-batches made no update. "
                "Let it end after a step (max_steps, max_epochs), or shorten accumulate_grad_batches."
            )
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Drops the window."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """The open window, where there is one."""
        grads = self._gradients
        return grads.state_dict() if grads is not None and grads.pending else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on in the window when training starts."""
        self._saved = state_dict

    def _backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """What `Strategy.backward` does, with `Gradients` in the place of the precision plugin's backward."""
        strategy, grads = self._trainer.strategy, self._gradients
        strategy.pre_backward(closure_loss)
        Precision.pre_backward(strategy.precision_plugin, closure_loss, strategy.lightning_module)  # no scaling
        if grads.pending == 0:
            grads.every = self._trainer.accumulate_grad_batches
        loss = closure_loss * self._trainer.accumulate_grad_batches
        update = grads.backward(loss, items=self._items(), last=self._stepping)
        if update is not None and not self._stepping:
            grads.reset()
            raise RuntimeError(
                "A window was full before Lightning's step. accumulate_grad_batches has been changed inside a window: "
                "change it between epochs, as GradientAccumulationScheduler does. The window was dropped."
            )
        self.update = update or self.update
        closure_loss = strategy.precision_plugin.post_backward(closure_loss, strategy.lightning_module)
        strategy.post_backward(closure_loss)
        return closure_loss

    def _optimizer_step(self, step: Callable[..., Any], optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the closure before `step`, which may not begin inside an open window."""
        self._stepping = True
        try:
            result = closure()
        finally:
            self._stepping = False
        if self._gradients.pending:  # the last training_step returned None
            self.update = self._gradients.flush()
            result = torch.tensor(0.0)
        return step(optimizer, lambda: result, *args, **kwargs)

    def _items(self) -> float | Tensor:
        if self.items is not None:
            return self.items(self._batch)
        return errors.check_lengths([(where, len(leaf)) for where, leaf in leaves(self._batch, "batch")])

    def _stop(self) -> None:
        if self._trainer is not None:
            for name in ("backward", "optimizer_step"):
                vars(self._trainer.strategy).pop(name, None)
        if self._gradients is not None and self._gradients.pending:
            self._gradients.reset()
        self._gradients = self._trainer = self._batch = None


def _check(trainer: Any, module: pl.LightningModule) -> None:
    """Refuses what has no window of one optimizer's gradients in `.grad`."""
    if not module.automatic_optimization:
        raise ValueError(
            "Accumulate is for automatic optimization. Received: automatic_optimization=False. "
            "In manual optimization use bigbatch.torch.Accumulator in training_step."
        )
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"Accumulate is for one optimizer. Received: {len(trainer.optimizers)} optimizers. "
            "In manual optimization use a bigbatch.torch.Accumulator for each, or one of several."
        )
    if is_overridden("backward", module, pl.LightningModule):
        raise ValueError(
            f"Accumulate takes the place of backward. Received: {type(module).__name__} with a backward of its own. "
            "Remove it, or use bigbatch.torch.Accumulator in manual optimization."
        )
    strategy = type(trainer.strategy).__name__
    if trainer.strategy.handles_gradient_accumulation or strategy in ("XLAStrategy", "SingleDeviceXLAStrategy"):
        raise ValueError(
            f"bigbatch needs the gradients in .grad. Received: {strategy}, which accumulates and reduces by itself. "
            "Use DDPStrategy or ModelParallelStrategy."
        )
