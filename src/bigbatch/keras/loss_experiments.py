"""Losses that are not the mean of their examples' own values, which no sum over micro-batches can make exact.

They are found by experiment, when the first micro-batch of a compiled model is traced: the loss is computed of a few
random examples. If it has one value an example, that must not change when the other examples change. If it has one
number a batch, that must be the mean of the numbers of the batch's halves: a sum or a Dice loss fails.
"""

import contextlib
import functools
import importlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from bigbatch.keras import randomness
from bigbatch.keras.methods import replaced

EXAMPLES = 4  # random ones, half of which change
EXAMPLES_WITH_DROPOUT = 32
UNKNOWN = 32  # in the place of a dimension that a graph does not know
LARGEST = 2**22  # numbers in an array of random examples; for larger ones there is no experiment

_done: "weakref.WeakSet[Any]" = weakref.WeakSet()  # compiled losses, and models


def warn_of_compiled_losses(model: Any, called: list[tuple[str, Callable[..., Any], Any, Any, Any]]) -> None:
    """Warns of compiled losses that are not means over the examples; once for each time the model is compiled.

    Args:
        model: a compiled model.
        called: each loss's name and the call that returned the values of a micro-batch, with its targets and
            predictions; all three may be symbolic.
    """
    if model._compile_loss in _done:
        return
    _done.add(model._compile_loss)
    of_batches, mixing = [], []
    for name, call, y, y_pred, values in called:
        of_batch = len(values.shape) == 0
        experiment = _is_a_mean if of_batch else _mixes
        with _isolated(model):
            result = _try(functools.partial(experiment, call, y, y_pred))
        if of_batch and not result:
            of_batches.append(name)
        elif result and not of_batch:
            mixing.append(name)
    if of_batches:
        _warn(
            f"A loss returns one number a batch, which bigbatch does not find to be the mean over its examples: "
            f"{_listed(of_batches)}.",
            "Let it return one value an example: pass axis= where the loss has one, as in Dice(axis=(1, 2, 3)), or "
            "reduce over every axis but the first. A sum is exact as such values with reduction='sum'.",
        )
    if mixing:
        _warn(
            f"A loss compares the examples of a batch with one another: {_listed(mixing)}. "
            "It sees those of one micro-batch alone.",
            'Pass loss_over="batch" to bb.accumulate: the loss then sees the whole batch.',
        )


def warn_of_added_losses(model: Any, x: Any, y: Any, sample_weight: Any) -> None:
    """Warns of what `add_loss` or a `compute_loss` of the model's own adds that is not a mean over the examples.

    Args:
        model: a compiled model that has such losses.
        x: a micro-batch's inputs, which may be symbolic, as may be the two that follow.
        y: its targets, or None.
        sample_weight: its weights, or None.
    """
    if model in _done:
        return
    _done.add(model)
    added = len(model.losses) - sum(v.regularizer is not None for v in model.trainable_weights)
    with _isolated(model):
        # In inference mode no Dropout hides that a loss is a mean; but some layers add their loss in training only.
        inference, training = (functools.partial(_means, model, (x, y, sample_weight), mode) for mode in (False, True))
        results = _try(inference)
        if results is None or len(results) < added:
            results = _try(training)
    others = [model.name] if results is None else [name for name, is_mean in results if not is_mean]
    if others:
        _warn(
            "add_loss or compute_loss adds a number that bigbatch does not find to be the mean over the examples: "
            f"{_listed(others)}.",
            "Divide by the number of examples, as keras.ops.mean does in the place of keras.ops.sum.",
        )


def _warn(what: str, remedy: str) -> None:
    warnings.warn(f"{what} The update is then not exactly the full batch's. {remedy}", stacklevel=2)


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _try(experiment: Callable[[], Any]) -> Any:
    """The experiment's result; None where the loss or the model does not accept the random examples."""
    try:
        return experiment()
    except Exception:
        return None


@contextlib.contextmanager
def _isolated(model: Any) -> Iterator[None]:
    """Runs outside of the graph that is being traced, and changes no variable and no random state."""
    backend = keras.backend.backend()
    framework: Any = importlib.import_module(backend)
    outside = {"jax": "ensure_compile_time_eval", "tensorflow": "init_scope", "torch": "no_grad"}[backend]
    # `_losses_override` is not public. tests/keras/test_private.py fails when it moves.
    override, model._losses_override = model._losses_override, []
    try:
        with warnings.catch_warnings(), randomness.preserved(model), getattr(framework, outside)():
            warnings.simplefilter("ignore")
            with keras.StatelessScope(collect_losses=True):
                yield
    finally:
        model._losses_override = override


def _mixes(call: Callable[..., Any], y: Any, y_pred: Any) -> bool | None:
    """Whether an example's value changes with the other examples; None where it changes at random."""
    both = _random((y, y_pred), (False, True), 0)
    half = EXAMPLES // 2
    others = tree.map_structure(
        lambda a, b: np.concatenate([a[:half], b[half:]]), both, _random((y, y_pred), (False, True), 1)
    )
    first, again, changed = (
        _numbers(call(*_mapped(ops.convert_to_tensor, given)))[:half] for given in (both, both, others)
    )
    return not _close(first, changed) if _close(first, again) else None


def _is_a_mean(call: Callable[..., Any], y: Any, y_pred: Any) -> bool | None:
    """Whether a batch's number is the mean of its halves' numbers."""
    both = _random((y, y_pred), (False, True), 0)
    whole, again, *halves = (float(_numbers(call(*_mapped(ops.convert_to_tensor, part)))) for part in _parts(both))
    return _agree(whole, again, halves, _is_narrow(y_pred))


def _means(model: Any, data: Any, training: bool) -> list[tuple[str, bool | None]]:
    """What adds to the model's loss, by name, and whether it is a mean over the examples."""
    names: list[str] = []
    data = _random(data, (True, False, True), 0, EXAMPLES_WITH_DROPOUT if training else EXAMPLES)

    def run() -> list[Any]:
        values: list[Any] = []
        mapping = [(v, _weight(v)) for v in model.variables] if keras.backend.backend() == "jax" else []
        with keras.StatelessScope(mapping, collect_losses=True):
            for part in _parts(data):
                names.clear()
                values.append(_added(model, _mapped(ops.convert_to_tensor, part), training, names))
        return values

    if keras.backend.backend() == "jax":  # whose fit takes the values out of the variables
        run = importlib.import_module("jax").jit(run)
    whole, again, *halves = [[float(_numbers(value)) for value in values] for values in run()]
    narrow = model.compute_dtype in ("float16", "bfloat16")
    columns = zip(names, whole, again, zip(*halves, strict=True), strict=True)
    return [(name, _agree(one, two, parts, narrow)) for name, one, two, parts in columns]


def _added(model: Any, data: Any, training: bool, names: list[str]) -> list[Any]:
    """The losses that layers and the model's own `compute_loss` add for this batch; `names` gets their sources."""
    x, y, sample_weight = data
    values: list[Any] = []

    def recording(layer: Any) -> Callable[[Any], None]:
        def add_loss(loss: Any) -> None:
            flat = tree.flatten(loss)
            values.extend(ops.sum(value) for value in flat)
            names.extend(f"{layer.name} (add_loss)" for _ in flat)
            type(layer).add_loss(layer, loss)

        return add_loss

    # Not public: `_flatten_layers`. tests/keras/test_private.py fails when it moves.
    with replaced([(layer, "add_loss", recording(layer)) for layer in model._flatten_layers()]):
        y_pred = model(x, training=training) if model._call_has_training_arg else model(x)
        if type(model).compute_loss is not keras.Model.compute_loss:
            values.append(model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight))
            names.append(f"{type(model).__name__}.compute_loss")
    return values


def _agree(whole: float, again: float, halves: Any, narrow: bool) -> bool | None:
    """Whether `whole` is the mean of the halves; where it is random, whether it is nearer to that than to the sum."""
    mean = sum(halves) / len(halves)
    if not np.isfinite([whole, mean]).all():
        return None
    allowed = (5e-2 if narrow else 1e-3) * max(abs(whole), abs(mean))
    if abs(whole - again) > allowed:
        allowed = 0.5 * min(abs(whole), abs(mean))
    return abs(whole - mean) <= allowed


def _parts(data: Any) -> list[Any]:
    """The whole batch, twice, and its halves."""
    half = len(tree.flatten(data)[0]) // 2
    return [data, data, _mapped(lambda x: x[:half], data), _mapped(lambda x: x[half:], data)]


def _random(data: Any, fractions: tuple[bool, ...], seed: int, examples: int = EXAMPLES) -> Any:
    """Random examples of these shapes.

    Args:
        data: nestings of tensors.
        fractions: for each, whether numbers of a floating type lie between 0 and 1; else all numbers are 0 or 1.
        seed: of the generator.
        examples: how many.
    """
    rng = np.random.default_rng(seed)
    probabilities = np.linspace(0.8, 0.2, examples)  # of a one: examples must differ in their number of ones

    def one(tensor: Any, fraction: bool) -> np.ndarray:
        shape = (examples, *(UNKNOWN if n is None else n for n in tensor.shape[1:]))
        if np.prod(shape, dtype=np.int64) > LARGEST:
            raise ValueError("Too large for an experiment.")
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        drawn = rng.random(shape)
        if not ("float" in dtype and fraction):
            drawn = drawn < probabilities.reshape(-1, *[1] * (len(shape) - 1))
        else:
            drawn = 0.05 + 0.9 * drawn
        return drawn.astype("float32" if dtype == "bfloat16" else dtype)

    return tuple(
        _mapped(functools.partial(one, fraction=fraction), part) for part, fraction in zip(data, fractions, strict=True)
    )


def _mapped(function: Callable[[Any], Any], data: Any) -> Any:
    """Of each array in a nesting; None stays None."""
    return tree.map_structure(lambda x: None if x is None else function(x), data)


def _numbers(values: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(values), np.float64)


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for rounding, where the first is finite."""
    finite = np.isfinite(one)
    allowed = 1e-3 * np.abs(one[finite]).max(initial=0) + 1e-30
    return np.allclose(one[finite], other[finite], rtol=0, atol=allowed)


def _is_narrow(tensor: Any) -> bool:
    return any(keras.backend.standardize_dtype(t.dtype) in ("float16", "bfloat16") for t in tree.flatten(tensor))


def _weight(variable: Any) -> Any:
    """A synthetic value of a variable, computed inside the program, which then stores no second model."""
    size, shape = int(np.prod(variable.shape, dtype=np.int64)), tuple(variable.shape)
    if "float" not in variable.dtype:
        return ops.zeros(shape, variable.dtype)
    wave: Any = ops.cos(ops.reshape(ops.cast(ops.arange(size), "float32"), shape))
    inputs = max(int(np.prod(shape[:-1], dtype=np.int64)), 1)
    value = wave / inputs**0.5 if variable.trainable else 0.6 + 0.4 * wave  # a variance is positive
    return ops.cast(value, variable.dtype)
