"""The micro-batch that fits on the PyTorch backend: Keras's layers, rehearsed on fake tensors."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import torch

from bigbatch import host
from bigbatch.engines import torch_estimate
from bigbatch.engines.torch_estimate import Rehearsals, State, release
from bigbatch.engines.torch_estimate import is_out_of_memory as is_out_of_memory
from bigbatch.keras import batch, losses, noise
from bigbatch.keras.backends.torch.window import add_up, cut, window


def auto_step(model: Any, fitting: Any) -> Callable[[Any], dict[str, Any]]:
    """A step on one batch, cut by `fitting`."""

    def step(data: Any) -> dict[str, Any]:
        data = _tensors(data)
        predictions = functools.partial(Predictions, model, data)
        return window(model, lambda: fitting(data, predictions, lambda size: add_up(model, cut(data, size))))

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
        model._symbolic_build(data_batch=data)
        self.parameters = [v.value for v in model.trainable_variables]
        self.meter = noise.meter_of(model)
        leaves = batch.leaves(data)
        self.length = len(leaves[0])
        self.rehearsals = Rehearsals(
            self._loss,
            lambda size: batch.nest(data, [leaf[:size] for leaf in leaves]),
            lambda value: self.parameters,
            self.length,
            torch.float32,
            "the model",
        )
        self.rehearsals.device = leaves[0].device
        self.reserve = torch_estimate.reserve(leaves[0].device)
        self.seconds, self.how, self.notes = self.rehearsals.seconds, self.rehearsals.how, self.rehearsals.notes

    def device_memory(self, memory: Any) -> host.Memory:
        """What is held and free."""
        return torch_estimate.device_memory(self.rehearsals.device)

    def needs(self, size: int) -> int:
        """Bytes that an update with micro-batches of `size` examples takes beside what is held."""
        gradients = sum(p.nbytes for p in self.parameters)
        # Where the noise is measured, a micro-batch's gradients lie beside the sums until it is over.
        measured = gradients if self.meter else 0
        # Once the micro-batches are gone the optimizer takes up to three copies of the gradients, as Keras's Adam does.
        return max(4 * gradients, measured + self.rehearsals.needs(size))

    def keeping(self) -> Callable[[], Callable[[], None]]:
        """A function that notes random states and what a window writes to; it returns one that gives them back."""
        device, written, meter = self.rehearsals.device, self.rehearsals.written, self.meter

        def keep() -> Callable[[], None]:
            state, begun = State(device, written), meter.begun if meter else 0

            def give_back() -> None:
                release(device)
                state.give_back()
                if meter:
                    meter.begun = begun

            return give_back

        return keep

    def _loss(self, data: Any) -> Any:
        """A micro-batch's loss, and what else is there during its backward."""
        x, y, sample_weight = batch.unpack(data)
        y_pred = self.model(x, training=True) if self.model._call_has_training_arg else self.model(x)
        found = losses.terms(self.model, x, y, y_pred, sample_weight, examined=False)
        with torch.no_grad():
            losses.update_metrics(self.model, x, y, y_pred, sample_weight)
        values = [self.model.optimizer.scale_loss(value) for value, _ in losses.kinds(found)]
        for layer in self.model._flatten_layers():
            layer._clear_losses()  # what add_loss was told, which would be kept until the next call
        return sum(values[1:], values[0]), (y_pred, found)
