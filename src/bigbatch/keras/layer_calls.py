"""The calls of a model's layers, intercepted: for inference mode, and to find where activations of two runs differ."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from bigbatch.keras.methods import replaced

Around = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def named(model: keras.Model) -> dict[str, Any]:
    """The model's layers and the model itself, each by a name of its own."""
    layers: dict[str, Any] = {}
    # Not public, as `_call_has_training_arg` below. tests/keras/test_private.py fails when they move.
    for layer in model._flatten_layers():
        name = layer.name
        if name in layers:
            name = f"{layer.path or name} ({len(layers)})"
        layers[name] = layer
    return layers


def calls(layers: Mapping[str, Any], around: Around) -> contextlib.AbstractContextManager[None]:
    """Every call of these layers goes through `around(name, call, args, kwargs)`."""

    def through(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: around(name, call, args, kwargs)

    return replaced([(layer, "call", through(name, layer.call)) for name, layer in layers.items()])


def in_inference_mode(layers: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """These layers are called with training=False, if their call takes it."""

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if layers[name]._call_has_training_arg:
            kwargs = {**kwargs, "training": False}
        return call(*args, **kwargs)

    return calls(layers, around)


class ActivationDiff:
    """Finds the layers where a run over the batch's first examples differs from a first run over all of them.

    Args:
        layers: by name.
        whole: whether the second run is over all examples too.
        allowed: the relative difference that is rounding.

    Attributes:
        differing: their names.
    """

    def __init__(self, layers: Mapping[str, Any], whole: bool, allowed: float):
        self.layers, self.whole, self.allowed = layers, whole, allowed
        self.seen: list[tuple[str, list[np.ndarray], list[np.ndarray]]] = []
        self.differing: list[str] = []

    def first(self) -> contextlib.AbstractContextManager[None]:
        """Records each layer's inputs and outputs."""

        def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = call(*args, **kwargs)
            then, now = _arrays((args, kwargs)), _arrays(output)
            if then is not None and now is not None:
                self.seen.append((name, then, now))
            return output

        return calls(self.layers, around)

    def second(self) -> contextlib.AbstractContextManager[None]:
        """Compares each layer's inputs and outputs with the recorded ones."""

        def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = call(*args, **kwargs)
            inputs, outputs = _arrays((args, kwargs)), _arrays(output)
            if inputs is None or outputs is None:
                return output
            if not self.seen or self.seen[0][0] != name:
                self.seen.clear()  # from here on this run calls other layers than the first
                return output
            _, inputs_then, outputs_then = self.seen.pop(0)
            if not self._agree(inputs_then, inputs) or self._agree(outputs_then, outputs):
                return output
            self.differing.append(name)
            # The first run's outputs replace these, so that later layers are compared by their own effect alone.
            parts = iter([_part(then, now, self.whole) for then, now in zip(outputs_then, outputs, strict=False)])
            return tree.map_structure(lambda x: _replaced(x, next(parts, None)) if ops.is_tensor(x) else x, output)

        return calls(self.layers, around)

    def _agree(self, full: list[np.ndarray], part: list[np.ndarray]) -> bool:
        """Whether the examples of `part` had the same values in the whole batch."""
        for then, now in zip(full, part, strict=False):
            same = _part(then, now, self.whole)
            if same is None or same.dtype != now.dtype:
                continue
            if not np.issubdtype(now.dtype, np.inexact) and now.dtype.kind != "V":
                if not np.array_equal(same, now):
                    return False
                continue
            one, two = same.astype(np.float64), now.astype(np.float64)
            allowed = self.allowed * max(float(np.abs(one).max(initial=0)), 1e-30)
            if not np.allclose(one, two, rtol=0, atol=allowed, equal_nan=True):
                return False
        return True


def _arrays(nest: Any) -> list[np.ndarray] | None:
    """The values of a nesting's tensors; None where there are none yet, inside a compiled loop."""
    try:
        return [np.asarray(ops.convert_to_numpy(x)) for x in tree.flatten(nest) if ops.is_tensor(x)]
    except (TypeError, NotImplementedError):
        return None


def _replaced(tensor: Any, array: np.ndarray | None) -> Any:
    return tensor if array is None else ops.convert_to_tensor(array, tensor.dtype)


def _part(full: np.ndarray, part: np.ndarray, whole: bool) -> np.ndarray | None:
    """The whole batch's values for the examples in `part`; None where no axis is that of the examples."""
    if whole:
        return full if full.shape == part.shape else None
    if full.ndim != part.ndim:
        return None
    axes = [axis for axis, (n, k) in enumerate(zip(full.shape, part.shape, strict=True)) if n != k]
    if len(axes) != 1 or full.shape[axes[0]] < part.shape[axes[0]]:
        return None
    return full[tuple(slice(k) for k in part.shape)]
