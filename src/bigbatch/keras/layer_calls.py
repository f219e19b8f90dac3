"""The calls of a model's layers, intercepted: for inference mode, and to find where activations of two runs differ."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from bigbatch.engines.activations import ActivationDiff
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


def recording(layers: Mapping[str, Any], diff: ActivationDiff) -> contextlib.AbstractContextManager[None]:
    """Records each layer's inputs and outputs."""

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        inputs, outputs = _arrays((args, kwargs)), _arrays(output)
        if inputs is not None and outputs is not None:
            diff.record(name, inputs, outputs)
        return output

    return calls(layers, around)


def comparing(layers: Mapping[str, Any], diff: ActivationDiff) -> contextlib.AbstractContextManager[None]:
    """Compares each layer's inputs and outputs with the recorded ones."""

    def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        inputs, outputs = _arrays((args, kwargs)), _arrays(output)
        if inputs is None or outputs is None:
            return output
        parts = iter(diff.compare(name, inputs, outputs))
        return tree.map_structure(lambda x: _replaced(x, next(parts, None)) if ops.is_tensor(x) else x, output)

    return calls(layers, around)


def _arrays(nest: Any) -> list[np.ndarray] | None:
    """The values of a nesting's tensors; None where there are none yet, inside a compiled loop."""
    try:
        return [np.asarray(ops.convert_to_numpy(x)) for x in tree.flatten(nest) if ops.is_tensor(x)]
    except (TypeError, NotImplementedError):
        return None


def _replaced(tensor: Any, array: np.ndarray | None) -> Any:
    return tensor if array is None else ops.convert_to_tensor(array, tensor.dtype)
