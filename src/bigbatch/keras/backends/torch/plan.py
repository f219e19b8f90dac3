"""The micro-batch that fits on the PyTorch backend: a dry run of Keras's layers on fake tensors."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import torch

from bigbatch import host
from bigbatch.engines import torch_estimate
from bigbatch.engines.torch_estimate import DryRuns, State, release
from bigbatch.engines.torch_estimate import is_out_of_memory as is_out_of_memory
from bigbatch.keras import batch, losses, noise
from bigbatch.keras.backends.torch.window import add_up, cut, window


def auto_step(model: Any, auto: Any) -> Callable[[Any], dict[str, Any]]:
    """A step on one batch, cut by `auto`."""

    def step(data: Any) -> dict[str, Any]:
        data = _tensors(data)
        predictions = functools.partial(Predictions, model, data)
        return window(model, lambda: auto(data, predictions, lambda size: add_up(model, cut(data, size))))

    return step


def _tensors(data: Any) -> Any:
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else keras.ops.convert_to_tensor(leaf), batch.unpack(data)
    )


class Predictions:
    """What the sizes of one batch's micro-batches need."""

    search: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, model: Any, data: Any):
        self.model, data = model, _tensors(data)
        # Not public. tests/keras/test_private.py fails when it moves.
        model._symbolic_build(data_batch=data)
        self.parameters = [v.value for v in model.trainable_variables]
        self.meter = noise.meter_of(model)
        leaves = batch.leaves(data)
        self.length = len(leaves[0])
        self.dry_runs = DryRuns(
            self._loss,
            lambda size: batch.nest(data, [leaf[:size] for leaf in leaves]),
            lambda value: self.parameters,
            self.length,
            torch.float32,
            "the model",
        )
        self.dry_runs.device = leaves[0].device
        self.reserve = torch_estimate.reserve(leaves[0].device)
        self.seconds, self.how, self.notes = self.dry_runs.seconds, self.dry_runs.how, self.dry_runs.notes

    def device_memory(self, memory: Any) -> host.Memory:
        """What is in use and free."""
        return torch_estimate.device_memory(self.dry_runs.device)

    def needs(self, size: int) -> int:
        """Bytes that an update with micro-batches of `size` examples takes beside what is in use."""
        gradients = sum(p.nbytes for p in self.parameters)
        # Where the noise is measured, a micro-batch's gradients exist beside the sums.
        measured = gradients if self.meter else 0
        # Once the micro-batches are gone the optimizer takes up to three copies of the gradients, as Keras's Adam does.
        return max(4 * gradients, measured + self.dry_runs.needs(size))

    def saver(self) -> Callable[[], Callable[[], None]]:
        """A function that saves random states and what a window writes to; it returns one that restores them."""
        device, written, meter = self.dry_runs.device, self.dry_runs.written, self.meter

        def save() -> Callable[[], None]:
            state, begun = State(device, written), meter.begun if meter else 0

            def restore() -> None:
                release(device)
                state.restore()
                if meter:
                    meter.begun = begun

            return restore

        return save

    def _loss(self, data: Any) -> Any:
        """A micro-batch's loss, and what else is there during its backward."""
        x, y, sample_weight = batch.unpack(data)
        forward = losses.Forward(x, y, batch.call(self.model, x), sample_weight)
        terms = losses.terms(self.model, forward, warn=False)
        with torch.no_grad():
            losses.update_metrics(self.model, forward)
        values = [self.model.optimizer.scale_loss(value) for value, _ in losses.kinds(terms)]
        for layer in self.model._flatten_layers():
            layer._clear_losses()  # those of add_loss, which a layer would keep until its next call
        return sum(values[1:], values[0]), (forward.y_pred, terms)
