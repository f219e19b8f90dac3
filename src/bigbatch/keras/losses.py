"""A model's loss, divided into terms, each with the items that its mean is over.

`compute_loss` returns one number: the weighted sum of every output's loss, of `add_loss` and of the regularizers. For
the law (`bigbatch.law`) each term needs its items: examples, the valid steps of a mask, or a sum of sample weights. So
the compiled losses are called through copies that record what Keras's own reduction divides by.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
from keras import ops, tree

# Not public: what a loss does with masks and sample weights, and attributes of a model's compiled losses and metrics.
# tests/keras/test_private.py fails when they move.
from keras.src.backend import get_keras_mask
from keras.src.losses.loss import apply_mask

from bigbatch import errors
from bigbatch.keras import loss_experiments

EXAMPLES = "examples"
SUM = "sum"


class Forward(NamedTuple):
    """A micro-batch after its forward pass: nestings of arrays, as `model.compute_loss` takes them.

    Attributes:
        x: inputs.
        y: targets, or None.
        y_pred: the model's outputs.
        sample_weight: weights of the examples, or None.
    """

    x: Any
    y: Any
    y_pred: Any
    sample_weight: Any


@dataclass
class Term:
    """One loss of one micro-batch.

    Attributes:
        value: the mean over `items`, a scalar; or the sum, where `kind` is SUM.
        items: what the mean is over, a scalar of the same dtype; 1 for a sum.
        weight: what the total loss multiplies it by, or None.
        kind: terms of one kind have the same items, so that one backward serves them all.
    """

    value: Any
    items: Any
    weight: Any
    kind: Hashable


def length(x: Any) -> Any:
    """How many examples a micro-batch holds: a number, or a tensor where the graph does not know it yet."""
    leaf = next(leaf for leaf in tree.flatten(x) if leaf is not None)
    return ops.shape(leaf)[0]  # pyright: ignore[reportOptionalSubscript]


def check_values(values: Any, x: Any, loss: Any, y: Any, y_pred: Any) -> None:
    """Accepts one value an example, or one a step of each: the examples must be the leading dimension."""
    examples = length(x)
    if values.shape[0] != examples:
        raise not_one_value_an_example(values, examples)


def not_one_value_an_example(values: Any, examples: int | str) -> Exception:
    """For a loss whose values are not one an example."""
    return ValueError(
        f"A loss must return one value an example. Received: {errors.received('values', values)[10:]} "
        f"for a micro-batch of {examples} examples. Keep the leading dimension, and reduce the others."
    )


def terms(
    model: Any,
    forward: Forward,
    *,
    replicas: int = 1,
    check: Callable[..., None] = check_values,
    warn: bool = True,
) -> list[Term]:
    """The terms of the model's loss, compiled losses first.

    Args:
        model: a compiled model.
        forward: a micro-batch.
        replicas: Keras divides means by the number of replicas that share the batch; this undoes it.
        check: gets a loss's values, the inputs, the loss, its targets and predictions, and raises where it refuses.
        warn: whether to warn of losses that are not means over the examples (`bigbatch.keras.loss_experiments`).
    """
    x, y, y_pred, sample_weight = forward
    if type(model).compute_loss is not keras.Model.compute_loss:
        # The user's own total, which must be a mean over the examples.
        value = model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        if warn:
            loss_experiments.warn_of_added_losses(model, x, y, sample_weight)
        return [_over_examples(_scalar(value) * replicas, x)]
    terms: list[Term] = []
    if model._compile_loss is not None:
        recording = _twin(model._compile_loss)
        flats = recording._flat_losses
        if not tree.is_nested(y) and not tree.is_nested(y_pred):
            flats = flats[:1]  # of several losses for one output, Keras minimises the first
        losses = [_Recording(flat.loss, flat.loss_weights, terms, x, replicas, check) for flat in flats]
        recording._flat_losses = [flat._replace(loss=loss) for flat, loss in zip(flats, losses, strict=True)]
        recording._metrics = [None] * len(flats)  # `report` updates them, once a window
        recording(y, y_pred, sample_weight)
        if warn:
            loss_experiments.warn_of_compiled_losses(model, [loss.called for loss in losses])
    added = model.losses
    terms += [_over_examples(model._aggregate_additional_loss(loss) * replicas, x) for loss in added]
    if warn and len(added) > sum(v.regularizer is not None for v in model.trainable_weights):
        loss_experiments.warn_of_added_losses(model, x, y, sample_weight)
    if not terms:
        raise ValueError("No loss to compute. Provide a `loss` argument in `compile()`.")
    return terms


def report(model: Any, terms: list[Term], means: list[Any], examples: Any) -> Any:
    """Updates the model's loss metrics with the batch's own means, once, as plain `fit` would, and returns the total.

    Args:
        model: the model.
        terms: those of any micro-batch of the window; only their weights and names are read.
        means: each term's mean over the window, or its sum.
        examples: how many examples the window held.
    """
    parts = [mean if term.weight is None else mean * term.weight for term, mean in zip(terms, means, strict=True)]
    total = sum(parts[1:], parts[0])
    model._loss_tracker.update_state(total, sample_weight=examples)
    if model._compile_loss is not None:
        # One for each compiled loss, if there are several; they stand first.
        for metric, mean in zip(model._compile_loss.metrics, means, strict=False):
            metric.update_state(mean, sample_weight=examples)
    return total


def update_metrics(model: Any, forward: Forward) -> None:
    """Adds a micro-batch to the model's metrics, without reading them, where `compute_metrics` is Keras's own."""
    x, y, y_pred, sample_weight = forward
    if type(model).compute_metrics is not keras.Model.compute_metrics:
        model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)
    elif model._compile_metrics is not None:
        model._compile_metrics.update_state(y, y_pred, sample_weight)


def are_means(terms: list[Term]) -> tuple[list[bool], list[bool]]:
    """Whether each term, and each kind of items, is a mean; a sum is not divided at the window's end."""
    return [term.kind != SUM for term in terms], [kind != SUM for kind in dict.fromkeys(term.kind for term in terms)]


def kinds(terms: list[Term]) -> list[tuple[Any, Any]]:
    """For each kind of items: the weighted sum of its terms, which is to be differentiated, and the items."""
    sums: dict[Hashable, tuple[Any, Any]] = {}
    for term in terms:
        value = term.value if term.weight is None else term.value * term.weight
        before = sums.get(term.kind)
        sums[term.kind] = (value, term.items) if before is None else (before[0] + value, before[1])
    return list(sums.values())


def _twin(loss: Any) -> Any:
    """A shallow copy; copy.copy would go through the loss's serialization."""
    twin = object.__new__(type(loss))
    twin.__dict__.update(loss.__dict__)
    return twin


class _Recording:
    """Calls a compiled loss as Keras does, and records its value and items in `terms`."""

    def __init__(self, loss: Any, weight: Any, terms: list[Term], x: Any, replicas: int, check: Callable[..., None]):
        self.loss, self.weight, self.terms, self.x = loss, weight, terms, x
        self.replicas, self.check = replicas, check
        self.values: Any = None
        self.called: Any = None
        self.name = loss.name

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        twin = _twin(self.loss)
        twin.call = self._call
        value = twin(y_true, y_pred, sample_weight)
        if self.called is None:  # a loss with a __call__ of its own
            self.called = self.loss.name, self.loss, y_true, y_pred, value
        term = self._term(_scalar(value), get_keras_mask(y_pred), sample_weight)
        if self.values is not None and self._narrowed(value):
            term = self._widened(term, twin, y_true, y_pred, sample_weight)
        self.terms.append(term)
        return value

    def _narrowed(self, value: Any) -> bool:
        """Whether Keras has divided float64 values in float32, as it does on PyTorch."""
        dtypes = [keras.backend.standardize_dtype(x.dtype) for x in (self.values, value)]
        return dtypes == ["float64", "float32"]

    def _widened(self, term: Term, twin: Any, y_true: Any, y_pred: Any, sample_weight: Any) -> Term:
        """The same mean, divided in float64."""
        twin.reduction, values = "sum", self.values
        twin.call = lambda y_true, y_pred: values
        total = twin(y_true, y_pred, sample_weight)
        items = ops.cast(term.items, "float64")
        over = ops.cast(math.prod(values.shape), "float64") if term.kind == EXAMPLES else items
        return Term(total / ops.where(over == 0, ops.ones_like(over), over), items, term.weight, term.kind)

    def _call(self, y_true: Any, y_pred: Any) -> Any:
        self.values = self.loss.call(y_true, y_pred)
        self.called = self.loss.name, self.loss.call, y_true, y_pred, self.values
        if len(self.values.shape) > 0:
            self.check(self.values, self.x, self.loss, y_true, y_pred)
        return self.values

    def _term(self, value: Any, mask: Any, sample_weight: Any) -> Term:
        reduction = self.loss.reduction
        if self.values is None or len(self.values.shape) == 0:
            # A loss that reduces by itself: its mean is over the examples.
            return _over_examples(value, self.x, self.weight)
        if reduction == "sum":
            return Term(value, ops.ones((), value.dtype), self.weight, SUM)
        value = value * self.replicas if self.replicas > 1 else value
        own = get_keras_mask(self.values)  # as ignore_class leaves one
        both = own if mask is None else mask if own is None else mask & own
        weighted = reduction == "mean_with_sample_weight" and sample_weight is not None
        if both is None and not weighted:
            return _over_examples(value, self.x, self.weight)
        dtype = self.values.dtype if self._narrowed(value) else value.dtype
        weights = ops.convert_to_tensor(sample_weight, dtype) if weighted else None
        counted: Any = apply_mask(weights, both, dtype=dtype, reduction="sum")
        # The kind holds the mask itself, so that no other object gets the same id.
        kind = (_Same(mask), _Same(own), _Same(sample_weight if weighted else None))
        items = ops.sum(counted)
        if weighted:
            # A negative or infinite weight must not cancel in the sum, but make it NaN, and the window is skipped.
            good = ops.all(ops.logical_and(counted >= 0, counted < float("inf")))
            items = ops.where(good, items, items * float("nan"))  # full_like would wait for the device on PyTorch
        return Term(value, items, self.weight, kind)


class _Same:
    """Equal to what wraps the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _over_examples(value: Any, x: Any, weight: Any = None) -> Term:
    return Term(value, ops.cast(length(x), value.dtype), weight, EXAMPLES)


def _scalar(value: Any) -> Any:
    if len(value.shape) > 0:
        raise errors.loss_not_scalar(value)
    return value
