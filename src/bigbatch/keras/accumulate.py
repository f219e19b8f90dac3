"""`accumulate`: how a model is given the batch it should see."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal

import keras

from bigbatch import errors
from bigbatch.every import Every, as_every
from bigbatch.keras import batch, split, stream
from bigbatch.keras import noise as noisy
from bigbatch.noise import one_in

_NOT_GIVEN: Any = object()
_OVERRIDDEN = ("train_step", "make_train_function", "fit", "train_on_batch")


def accumulate(
    model: keras.Model,
    micro_batch: int | Literal["auto"] | None = _NOT_GIVEN,
    *,
    every: Every | None = _NOT_GIVEN,
    partial: Literal["apply", "carry", "drop"] = "apply",
    noise: bool | int = False,
) -> keras.Model:
    """Makes `fit` take one update from many micro-batches, with the gradient of the batch they make together.

    One line before `fit`::

        bb.accumulate(model, micro_batch=32)    # split: batch_size is the batch, 32 examples are in memory at once
        model.fit(x, y, batch_size=2048)

        bb.accumulate(model, every=64)          # stream: the data set yields micro-batches
        model.fit(dataset)

    Everything else about `fit` and `train_on_batch` stays: the optimizer is the one given to `compile`, and is applied
    once an update. A step of `fit`, and so `on_train_batch_end` and the progress bar, is one update. A window whose
    loss or gradients are inf or NaN makes no update; its loss is in the logs as it is.

    Args:
        model: a model whose `train_step` is Keras's own; built and compiled or not yet.
        micro_batch: examples in memory at once. The batch is cut in order; its last micro-batch may be shorter.
            "auto" plans the number that fits, once for each shape of batch, and says so in one line
            (`logging.getLogger("bigbatch.keras")`); if memory runs out anyway, the window is done again with half the
            size (docs/memory.md).
        every: when a window of the stream closes: a number of micro-batches; a callable that takes the update's index
            and returns one (batch-size warm-up); or `bb.items(4096)`, which counts examples.
        partial: for the stream, what becomes of a window that the epoch's end cut short: "apply" makes the update from
            what is there, "carry" keeps its micro-batches for the next epoch, "drop" forgets them. The log
            (`logging.getLogger("bigbatch.keras")`) says so each time.
        noise: measures the gradient noise scale: it is in `fit`'s logs as `noise_scale`, and with its error in
            `bb.noise_scale(model)`. True measures one window in twenty, an integer n one in n. On one device.

    Returns:
        The model, changed in place. Calling again replaces what was asked before, and `accumulate(model, None)` gives
        the model back as it was.

    Raises:
        TypeError, ValueError: an argument is not as described, or the model trains in a way that cannot be cut: a
            `train_step` of its own, or `gradient_accumulation_steps`. The model is as it was.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model. {errors.received('model', model)}")
    given: dict[str, Any] = {
        name: value for name, value in (("micro_batch", micro_batch), ("every", every)) if value is not _NOT_GIVEN
    }
    if given and all(value is None for value in given.values()):
        _restore(model)
        return model
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"Pass one of micro_batch and every. Received: {given or 'neither'}. "
            "micro_batch=32 cuts the batches that fit is given; every=64 takes what the data set yields as "
            "micro-batches, and makes one update of 64."
        )
    errors.check_choice("partial", partial, ("apply", "carry", "drop"))
    if "every" in given:
        given["every"] = as_every(every)
    elif micro_batch != "auto":
        given["micro_batch"] = errors.check_micro_batch(micro_batch)
    measured = one_in(noise)
    if measured:
        noisy.check_devices(model, noise)
    check_model(model)
    _restore(model)
    noisy.attach(model, measured)
    if "every" in given:
        stream.open_door(model, given["every"], partial)
    else:
        split.open_door(model, given["micro_batch"])
    _check_at_the_door(model)
    return model


def _restore(model: Any) -> None:
    for name in _OVERRIDDEN:
        model.__dict__.pop(name, None)
    noisy.attach(model, 0)
    model.train_function = None  # as compile does: it is made again when it is next needed


def check_model(model: Any) -> None:
    """Refuses a model that trains in a way that cannot be cut."""
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"{type(model).__name__} has a train_step of its own, which bigbatch would replace. "
            "Override compute_loss and compute_metrics instead; both are kept."
        )
    if keras.backend.backend() == "jax" and keras.config.is_nnx_enabled():
        raise ValueError("With NNX enabled, Keras would pass bigbatch's train_step over. Disable KERAS_NNX_ENABLED.")
    optimizer = getattr(model, "optimizer", None)
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of loss scaling
    for one in (optimizer, *getattr(optimizer, "optimizers", ())):  # a MultiOptimizer's
        steps = getattr(one, "gradient_accumulation_steps", None)
        if steps:
            raise ValueError(
                f"The optimizer accumulates too. Received: gradient_accumulation_steps={steps}. "
                "Leave it out: with bigbatch as well it would accumulate twice."
            )


def _check_at_the_door(model: Any) -> None:
    """Lets `fit` and `train_on_batch` see what is wrong before anything moves, and warn of what cannot be exact."""
    warned = False

    def checked(method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal warned
            given = signature.bind(*args, **kwargs).arguments
            if model.compiled:  # else Keras says so
                check_model(model)
                _check_arrays(given)
                if noisy.meter_of(model) is not None:
                    noisy.check_devices(model)
                if not warned:
                    warned = _warn_of_batch_norm(model)
            kept = split.backend().keep(model) if keras.backend.backend() == "jax" and model.compiled else None
            try:
                return method(*args, **kwargs)
            except BaseException as error:
                if kept is not None:
                    split.backend().give_back(kept)
                if isinstance(error, Exception):
                    # TensorFlow may keep what an error cut short while it was traced, and run it at the next call.
                    model.train_function = None
                raise

        return call

    model.fit, model.train_on_batch = checked(model.fit), checked(model.train_on_batch)


def _check_arrays(given: dict[str, Any]) -> None:
    data = tuple(given.get(name) for name in ("x", "y", "sample_weight"))
    leaves = batch.leaves(data)
    if leaves and all(hasattr(leaf, "shape") for leaf in leaves):
        batch.check(data)


def _warn_of_batch_norm(model: Any) -> bool:
    names = [
        layer.name
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    if names:
        warnings.warn(
            f"BatchNormalization normalizes over each micro-batch, not over the batch: {', '.join(names)}. "
            "The update is then not exactly the big batch's. GroupNormalization and LayerNormalization are exact.",
            stacklevel=3,
        )
    return bool(names)
