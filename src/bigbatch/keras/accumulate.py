"""`accumulate`: its arguments, checked, and what it installs on the model."""

from typing import Any, Literal

import keras

from bigbatch import errors
from bigbatch.every import Every, as_every
from bigbatch.keras import copies, split, stream
from bigbatch.keras import noise as noise_meter
from bigbatch.keras.checks import check_calls, check_cut, check_model, check_one_device
from bigbatch.noise import one_in

_NOT_GIVEN: Any = object()
# All that is installed on the model. Not public: stream.BUILD (tests/keras/test_private.py fails when it moves).
_INSTALLED = (
    "train_step", "make_train_function", "fit", "train_on_batch", "save", "save_weights", "load_weights",
    "__reduce__", "get_compile_config", stream.BUILD,
)  # fmt: skip


def accumulate(
    model: keras.Model,
    micro_batch: int | Literal["auto"] | None = _NOT_GIVEN,
    *,
    every: Every | None = _NOT_GIVEN,
    partial: Literal["apply", "carry", "drop"] = _NOT_GIVEN,
    noise: bool | int = False,
    loss_over: Literal["micro_batch", "batch"] = "micro_batch",
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
            "auto" plans the number that fits, once for each shape of batch, and logs the plan in one line
            (`logging.getLogger("bigbatch.keras")`); if memory runs out anyway, the window is run again with half the
            size (docs/memory.md).
        every: when a window of the stream closes: a number of micro-batches; a callable that takes the update's index
            and returns one (batch-size warm-up); or `bb.items(4096)`, which counts examples.
        partial: with `every`, what becomes of a window that the epoch's end cut short: "apply", the default, makes the
            update from the micro-batches that it has, "carry" keeps them for the next epoch, "drop" discards them. Each
            time is logged (`logging.getLogger("bigbatch.keras")`).
        noise: measures the gradient noise scale: it is in `fit`'s logs as `noise_scale`, and with its error in
            `bb.noise_scale(model)`. True measures one window in twenty, an integer n one in n. On one device.
        loss_over: with `micro_batch`, what `compile`'s loss and metrics see. "batch": the whole batch's outputs, for a
            loss that compares the batch's examples, as contrastive and ranking losses do. The model runs forward one
            micro-batch at a time, and once more for the gradients, with the same random numbers; in memory are the
            activations of one micro-batch, and all outputs. Losses of `add_loss` must be means over the examples. On
            one device, without `noise` and not yet with "auto".

    Returns:
        The model, changed in place; copies by `copy` and `pickle` accumulate too. Calling again replaces what was asked
        before, and `accumulate(model, None)` gives the model back as it was.

    Raises:
        TypeError, ValueError: an argument is not as described or has no effect, or the model trains in a way that
            cannot be cut: a `train_step` of its own, `gradient_accumulation_steps`, or, for `micro_batch`, a stateful
            layer. The model is as it was.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model. {errors.received('model', model)}")
    given = _accepted(micro_batch, every, partial)
    measured = one_in(noise)
    whole = errors.check_choice("loss_over", loss_over, ("micro_batch", "batch")) == "batch"
    if whole:
        _check_whole(given, measured)
    if not given:
        if measured:
            raise ValueError(f"noise has no effect where nothing accumulates. {errors.received('noise', noise)}")
        _restore(model)
        return model
    if measured:
        noise_meter.check_devices(model, noise)
    check_model(model)
    if "micro_batch" in given:
        check_cut(model)
    if whole:
        check_one_device(model, "loss_over='batch' joins the outputs of one device. Train on one.")
    elif given.get("micro_batch") == "auto":
        check_one_device(model)
    _restore(model)
    noise_meter.attach(model, measured)
    if "every" in given:
        stream.install(model, given["every"], given.get("partial", "apply"))
    else:
        split.install(model, given["micro_batch"], whole)
    check_calls(model, cuts="micro_batch" in given)
    copies.attach(model, accumulate, {**given, "noise": noise, "loss_over": loss_over})
    return model


def _check_whole(given: dict[str, Any], measured: int) -> None:
    """Refuses what does not go with a loss over the whole batch."""
    if "micro_batch" not in given or given["micro_batch"] == "auto":
        raise ValueError(
            f"loss_over='batch' needs micro_batch as a number. Received: {given or 'nothing'}. "
            "Pass micro_batch=32, and the batch as fit's batch_size: the loss is over what fit calls a batch."
        )
    if measured:
        raise ValueError(
            f"The noise is measured from the micro-batches' own losses, which loss_over='batch' has none of. "
            f"{errors.received('noise', measured)} Leave noise out."
        )


def _accepted(micro_batch: Any, every: Any, partial: Any) -> dict[str, Any]:
    """The options that were given, checked; none where the model is to be as it was."""
    given = {name: value for name, value in (("micro_batch", micro_batch), ("every", every)) if value is not _NOT_GIVEN}
    off = bool(given) and all(value is None for value in given.values())
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1 and not off:
        raise ValueError(
            f"Pass one of micro_batch and every. Received: {given or 'neither'}. "
            "micro_batch=32 cuts the batches that fit is given; every=64 takes what the data set yields as "
            "micro-batches, and makes one update of 64."
        )
    if "every" in given:
        given["every"] = as_every(every)
    elif given and not (isinstance(micro_batch, str) and micro_batch == "auto"):
        given["micro_batch"] = errors.check_micro_batch(micro_batch)
    if partial is not _NOT_GIVEN:
        errors.check_choice("partial", partial, ("apply", "carry", "drop"))
        if "every" not in given:
            raise ValueError(
                f"partial has no effect without every. {errors.received('partial', partial)} "
                "Leave it out: only a stream's epoch can end within a window."
            )
        given["partial"] = partial
    return given


def _restore(model: Any) -> None:
    for name in _INSTALLED:
        model.__dict__.pop(name, None)
    noise_meter.attach(model, 0)
    model.train_function = None  # as compile does: it is made again at the next step
