"""`audit`: is accumulation exact for this model, as it was compiled, and these data?

`bigbatch.audit_experiments` has the experiments. This file runs the model for them and restores it after each run. A
layer keeps the dtype that it was made with, so the runs are in that dtype.
"""

import contextlib
import importlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops

# Not public: the generator that draws where a seed is None, the adapter of arrays, what builds a model from data, and
# the list of a layer's losses. tests/keras/test_private.py fails when they move.
from keras.src.random import seed_generator
from keras.src.trainers.data_adapters import get_data_adapter

from bigbatch import errors
from bigbatch.audit import Audit, Cause, compared, differing, rank
from bigbatch.audit_experiments import examine
from bigbatch.audit_probe import Run
from bigbatch.engines.activations import ActivationDiff
from bigbatch.keras import batch, layer_calls, losses, noise, randomness, whole_batch
from bigbatch.keras.checks import check_cut, check_model

# What to do about each cause in Keras, where `fit` has the loss and no loss function returns its items.
REMEDIES = {
    "module": "Normalize within the example (GroupNormalization, LayerNormalization), or call it with training=False, "
    "as layer.trainable = False does for a BatchNormalization.",
    "items": "Let compile have a loss with one value an example or step, and a mask or sample_weight for what does not "
    "count: what its reduction divides by is then what counts. A compute_loss of your own, every add_loss and a loss "
    "that reduces by itself must be a mean over the examples.",
    "sum": "Divide by the number of examples in the micro-batch. A loss for compile may have reduction='sum'.",
    "terms": "Let compile have each part as the loss of an output: every output counts its own items.",
    "coupling": 'No accumulation of gradients can be exact. Pass loss_over="batch" to bb.accumulate',
    "not finite": "A mean over nothing is 0/0: let compile have a loss with one value a step, and a mask; or divide by "
    "the larger of the count and 1.",
}


def audit(model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None, *, micro_batch: int = 32) -> Audit:
    """Reports whether a `bb.accumulate`d model gets the update that plain `fit` makes of the batch, and if not, why.

    It compares the gradient of the model's own loss over the whole batch with the one that bigbatch's window makes of
    micro-batches, in training mode and in the variables' own dtype, and finds the cause by experiment::

        print(bb.audit(model, x[:60], y[:60], micro_batch=16))
        # not exact: 4 of 6 parameters differ, the largest by 25%
        # - module (batch_normalization): An example's output of batch_normalization depends on the other examples …

    The answer is about this batch. Give it one like those you train on: ragged where they are, with masks that differ.
    Some dozens of examples are enough; the whole batch must fit in memory, and it is passed over 10 to 50 times, on
    JAX with a compilation for each size that a micro-batch, or a repetition of examples, has.

    Args:
        model: a compiled model. One that is not built yet is built, as `fit` would.
        x: inputs, arrays of shape (examples, …), as `fit` takes them.
        y: targets, or None.
        sample_weight: weights, or None.
        micro_batch: examples in a micro-batch; fewer than the batch holds.

    Returns:
        An `Audit`: `verdict`, `exact`, `causes`, `parameters`, `table()` and `figure(path)`.

    Raises:
        TypeError, ValueError: an argument is not as described, or the model or its loss cannot be trained.

    Variables, metrics, seeds and the random state are restored, also after an error; the optimizer and compiled
    functions are not touched. What a forward writes into objects of its own, such as a list, stays.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model. {errors.received('model', model)}")
    if not model.compiled:
        raise ValueError("An audit is of a model's loss. You must call `compile()` before calling `audit()`.")
    micro_batch = errors.check_micro_batch(micro_batch, auto=False)
    length = batch.check((x, y, sample_weight)) or 0
    if micro_batch >= length:
        raise errors.one_micro_batch(micro_batch, length)
    if noise.devices(model) > 1:
        raise ValueError(f"An audit runs on one device. Received: {noise.devices(model)} devices.")
    check_model(model)
    check_cut(model)
    adapter = get_data_adapter(
        x, y, sample_weight, batch_size=length, steps_per_epoch=None, shuffle=False, class_weight=None
    )
    data = next(iter(adapter.get_numpy_iterator()))
    model._symbolic_build(data_batch=data)
    if not model.trainable_variables:
        raise ValueError("The model does not have any trainable weights. An audit compares their gradients.")
    with randomness.preserved(model):
        runner = AuditRunner(model, data, length, micro_batch)
        result = examine(runner)
        causes = [replace(cause, remedy=REMEDIES.get(cause.kind, cause.remedy)) for cause in result.causes]
        causes = [_with_loss_over_batch(runner, result, cause) for cause in causes]
    return replace(result, causes=causes)


def _with_loss_over_batch(runner: "AuditRunner", result: Audit, cause: Cause) -> Cause:
    """A coupled loss with what the loss over the whole batch was seen to give."""
    if cause.kind != "coupling":
        return cause
    # In inference mode: what a layer draws, or takes over the micro-batch, is another cause.
    quiet = frozenset(runner.layers)
    all_rows = range(runner.length)
    whole, over_batch = (runner.gradient([all_rows], seed=0, quiet=quiet, over_batch=b) for b in (False, True))
    seen = compared(whole, over_batch)
    exact = not differing(seen, result.tolerance)
    worst = max((p.error for p in seen), key=rank)
    found = (
        f": seen to be the full batch's gradient, to {worst:.0e}."
        if exact
        else ", once the other causes are gone: the outputs of the micro-batches are not those of the batch."
    )
    return replace(cause, remedy=cause.remedy + found)


class AuditRunner:
    """Runs one model's loss on one batch (see `audit_experiments`)."""

    def __init__(self, model: Any, data: Any, length: int, micro_batch: int):
        self.model, self.data = model, data
        self.leaves = [np.asarray(leaf) for leaf in batch.leaves(data)]
        self.length, self.micro_batch = length, micro_batch
        self.layers = layer_calls.named(model)
        dtypes = {v.dtype for v in model.trainable_variables} | {layer.compute_dtype for layer in self.layers.values()}
        self.dtype = next((d for d in ("float16", "bfloat16", "float32") if d in dtypes), "float64")
        self.names = [v.path for v in model.trainable_variables]
        self.names = [f"{name} ({k})" if self.names.count(name) > 1 else name for k, name in enumerate(self.names)]
        variables = [*model.variables, *model.metrics_variables, seed_generator.global_seed_generator().state]
        self.state = [(v, ops.copy(ops.stop_gradient(v.value))) for v in {id(v): v for v in variables}.values()]
        self.losses = [(layer, list(layer._losses)) for layer in self.layers.values()]
        self.programs: dict[Any, Callable[..., Any]] = {}
        self.float = keras.config.floatx()
        # As in training: without it, gradients in float16 vanish.
        self.scale = _number(model.optimizer.scale_loss(ops.ones(())))

    def gradient(
        self,
        parts: Sequence[Sequence[int]],
        *,
        seed: int,
        quiet: frozenset[str],
        fresh: bool = False,
        items: Any = None,
        scale: float = 1.0,
        over_batch: bool = False,
    ) -> dict[str, np.ndarray]:
        """Plain Keras's gradient of one part; of several the window's, Σ nᵢ·gᵢ / Σ nᵢ for each kind of items.

        With `over_batch` it is of the whole batch's loss, over outputs that are made micro-batch by micro-batch.
        """
        losses: list[tuple[Any, Any]] = []
        sums: list[list[np.ndarray]] = []
        counts: list[float] = []
        scale *= self.scale
        with self.restored(seed, quiet) as reset:
            evaluate = self.total_over_batch if over_batch else self.total if len(parts) == 1 else self.kinds
            differentiate = self.program(_backend().gradients, evaluate, quiet)
            for i, rows in enumerate(parts):
                if fresh:
                    reset()
                losses, gradients = differentiate(self.select(rows), ops.convert_to_tensor(scale, self.float))
                sums = sums or [[np.zeros(tuple(v.shape)) for v in self.model.trainable_variables] for _ in losses]
                counts = counts or [0.0] * len(losses)
                for k, ((_, n), own) in enumerate(zip(losses, gradients, strict=True)):
                    if n is None:  # a sum
                        n, counts[k] = 1.0, 1.0
                    else:
                        n = _number(n) if items is None else items[i]
                        counts[k] += n
                    for total, g in zip(sums[k], own, strict=True):
                        if g is not None:
                            total += n * np.asarray(ops.convert_to_numpy(g), np.float64)
            if not any(np.any(total) for totals in sums for total in totals):
                raise errors.loss_without_gradient(losses[0][0])
        with np.errstate(all="ignore"):
            means = [[total / (n * scale) for total in totals] for totals, n in zip(sums, counts, strict=True)]
        return {name: np.sum(of_kinds, axis=0) for name, *of_kinds in zip(self.names, *means, strict=True)}

    def loss(self, rows: Sequence[int], *, seed: int, quiet: frozenset[str]) -> Run:
        """One forward pass over these rows; of several kinds of items, the first one's."""
        with self.restored(seed, quiet):
            losses, _ = self.program(_backend().losses, self.kinds, quiet)(self.select(rows), ops.ones((), self.float))
            items = next((n for _, n in losses if n is not None), len(rows))
            return Run(sum(_number(value) for value, _ in losses), _number(items))

    def program(self, make: Callable[..., Any], evaluate: Any, quiet: frozenset[str]) -> Callable[..., Any]:
        """The backend's function of arrays and a scale: it returns (loss, items) for each kind, and gradients."""
        if (make, evaluate, quiet) not in self.programs:

            def objective(leaves: list[Any], scale: Any) -> list[tuple[Any, Any]]:
                return [(value * ops.cast(scale, value.dtype), n) for value, n in evaluate(leaves)]

            self.programs[make, evaluate, quiet] = make(self.model, objective)
        return self.programs[make, evaluate, quiet]

    def select(self, rows: Sequence[int]) -> list[Any]:
        """The arrays of these examples."""
        index = np.asarray(list(rows))
        return [ops.convert_to_tensor(leaf[index]) for leaf in self.leaves]

    def forward(self, leaves: list[Any]) -> losses.Forward:
        """The model's forward pass in training mode."""
        x, y, sample_weight = batch.unpack(batch.nest(self.data, leaves))
        return losses.Forward(x, y, batch.call(self.model, x), sample_weight)

    def total(self, leaves: list[Any]) -> list[tuple[Any, Any]]:
        """What plain `fit` differentiates, as a mean over one item."""
        x, y, y_pred, sample_weight = self.forward(leaves)
        total = self.model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        if len(total.shape) > 0:
            raise errors.loss_not_scalar(total)
        return [(total, 1.0)]

    def total_over_batch(self, leaves: list[Any]) -> list[tuple[Any, Any]]:
        """What `loss_over="batch"` differentiates, as a mean over one item."""
        made = []
        for start in range(0, self.length, self.micro_batch):
            x, _, _ = batch.unpack(batch.nest(self.data, [leaf[start : start + self.micro_batch] for leaf in leaves]))
            made.append(whole_batch.called(self.model, x))
        arrays = [ops.concatenate(of_one) for of_one in zip(*(one.arrays for one in made), strict=True)]
        sizes = [min(self.micro_batch, self.length - start) for start in range(0, self.length, self.micro_batch)]
        added = [
            sum(value * (n / self.length) for value, n in zip(of_one, sizes, strict=True))
            for of_one in zip(*(one.added for one in made), strict=True)
        ]
        data = batch.nest(self.data, leaves)
        return [(whole_batch.loss_of(self.model, data, whole_batch.joined(made[0], arrays), added), 1.0)]

    def kinds(self, leaves: list[Any]) -> list[tuple[Any, Any]]:
        """What a window differentiates: (loss, items) for each kind of items; items are None for a sum."""
        terms = losses.terms(self.model, self.forward(leaves), warn=False)
        means = losses.are_means(terms)[1]
        return [(value, n if mean else None) for (value, n), mean in zip(losses.kinds(terms), means, strict=True)]

    def sources(self, rows: Sequence[int], seed: int, quiet: frozenset[str]) -> list[str]:
        """The layers whose outputs for the first rows differ from those in a run over the whole batch."""
        allowed = 1e-4 if self.dtype in ("float64", "float32") else 5e-2  # some operations may use a narrower dtype
        diff = ActivationDiff(len(rows) == self.length, allowed)
        for run, selected, with_seed in (
            (layer_calls.recording, range(self.length), 0),
            (layer_calls.comparing, rows, seed),
        ):
            with self.restored(with_seed, quiet), run(self.layers, diff):
                self.kinds(self.select(selected))
        return list(dict.fromkeys(diff.differing))

    @contextlib.contextmanager
    def restored(self, seed: int, quiet: frozenset[str]) -> Iterator[Callable[[], None]]:
        """The model as it is, with random numbers seeded and the quiet layers in inference mode; restored afterwards.

        Yields a function that resets the variables within.
        """

        def reset() -> None:
            for variable, value in self.state:
                if seed and variable.name == "seed_generator_state":
                    value = value + ops.convert_to_tensor(np.asarray([seed, 0]), variable.dtype)
                variable.assign(value)

        random.seed(seed)
        np.random.seed(seed)
        _backend().seed(seed)
        try:
            with layer_calls.in_inference_mode({name: self.layers[name] for name in quiet}):
                reset()
                yield reset
        finally:
            for variable, value in self.state:
                variable.assign(value)
            self.model._clear_losses()
            for layer, added in self.losses:
                layer._losses[:] = added


def _number(x: Any) -> float:
    value: Any = ops.convert_to_numpy(x)
    return float(value)


def _backend() -> Any:
    """What the backend that Keras runs on does for an audit."""
    return importlib.import_module(f"bigbatch.keras.backends.{keras.backend.backend()}.audit")
