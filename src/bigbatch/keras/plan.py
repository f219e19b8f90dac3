"""The micro-batch that fits: planned for each shape of batch that `fit` sees, lowered when memory runs out anyway.

`backends/<backend>/plan.py` predicts what a size needs, and has a step that adds the micro-batches up apart from the
update. So after an out-of-memory the sum can be repeated, and no update is ever cut short.
"""

import importlib
import logging
import time as clock
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import tree

# Not public; as in stream.py. tests/keras/test_private.py fails when it moves.
from keras.src.trainers.data_adapters import get_data_adapter

from bigbatch import errors
from bigbatch.keras import batch
from bigbatch.keras.checks import check_model, check_one_device
from bigbatch.plan import Choice, Plan, budget, choose, fitting, log_choice, timed

# One line a choice, logged as a warning, which is seen even where logging was never set up: the choice decides how
# fast training is, and bigbatch makes it for the user.
logger = logging.getLogger("bigbatch.keras")


def plan(
    model: keras.Model,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int | None = None,
    memory: str | float | None = None,
    time: bool = False,
) -> Plan:
    """The largest micro-batch that fits, and why, without running out of memory to find out.

    Nothing is trained, and the model's variables stay as they are. On TensorFlow the step is traced into a graph, which
    runs nothing, and its tensors' lifetimes are read off. On JAX the step is compiled for each size, and the compiler
    states what the program takes. On PyTorch the model is called on tensors that have shapes and no contents; a model
    that reads values in its forward is run on 4 and on 8 examples instead, with a straight line through the two, and
    the plan states it::

        plan = bb.plan(model, x, y, batch_size=2048, memory="8GiB")
        plan.show()
        bb.accumulate(model, micro_batch=plan.micro_batch)

    Args:
        model: a compiled model. It is built if it is not yet, as `fit` would.
        x: arrays or a data set, as `fit` takes them. Of a data set the first batch is what is planned for.
        y: targets, as `fit` takes them.
        sample_weight: as `fit` takes it.
        batch_size: of arrays, the batch that one update is to see; by default all of them, as in `train_on_batch`.
        memory: what everything in use together may reach: a size ("8GiB", or bytes as an integer); a fraction
            (0 < float ≤ 1) of what is free; by default what is free less a reserve (docs/memory.md). On a CPU free is
            what the machine, the process's cgroups and its ulimits leave.
        time: also times the largest size that fits, its half, its quarter, …, and takes the fastest.

    Returns:
        The `bigbatch.plan.Plan`: `micro_batch`, `candidates`, `budget`, `show()` and `save("plan.png")`.

    Raises:
        TypeError, ValueError: an argument is not as described, or no example fits `memory`.
        MemoryError: no example fits what is free.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model. {errors.received('model', model)}")
    if not model.compiled:
        raise ValueError("You must call `compile()` before calling `plan()`.")  # Keras's words
    check_model(model)
    check_one_device(model)
    if batch_size is not None:
        batch_size = errors.check_batch_size(batch_size)
    elif all(hasattr(leaf, "shape") for leaf in batch.leaves((x, y, sample_weight))):
        batch_size = batch.check((x, y, sample_weight))
    adapter = get_data_adapter(
        x, y, sample_weight, batch_size=batch_size, steps_per_epoch=None, shuffle=False, class_weight=None
    )
    data = next(iter(adapter.get_numpy_iterator()))
    return _planned(planner().Predictions(model, data), memory, time)


def planner() -> Any:
    """The module that plans on the backend that Keras runs on."""
    return importlib.import_module(f"bigbatch.keras.backends.{keras.backend.backend()}.plan")


def _planned(predictions: Any, memory: Any, time: bool) -> Plan:
    allowed = budget(memory, predictions.device_memory(memory), reserve=predictions.reserve)
    planned = choose(
        predictions.needs,
        predictions.length,
        allowed,
        predictions.how,
        notes=predictions.notes(),
        given=memory,
        **predictions.search,
    )
    return timed(planned, predictions.needs, predictions.seconds) if time else planned


class ShapeChoice(NamedTuple):
    """What is remembered for one shape of batch."""

    choice: Choice
    save: Callable[[], Callable[[], None]]  # as `bigbatch.plan.fitting` takes it


class AutoMicroBatch:
    """The micro-batches of one model, for as long as its train function lives: until it is compiled again."""

    def __init__(self) -> None:
        self.choices: dict[Any, dict[int, ShapeChoice]] = {}

    def __call__(self, data: Any, predictions: Callable[[], Any], run: Callable[[int], Any]) -> Any:
        """Runs `run(micro_batch)` with the micro-batch that fits, and after an out-of-memory with half of it.

        What `run` wrote to is restored before it is run again, so that the result is, bit for bit, what the smaller
        micro-batch would have given in the first place.

        Args:
            data: the batch.
            predictions: makes the backend's `Predictions` for it.
            run: adds the micro-batches up, and makes no update.

        Raises:
            Exception: as `bigbatch.plan.fitting`.
        """
        length = batch.check(data) or 0
        choice, save = self._choice(data, length, predictions)
        return fitting(run, choice, length, planner().is_out_of_memory, logger, save)

    def _choice(self, data: Any, length: int, predictions: Callable[[], Any]) -> ShapeChoice:
        # An epoch's last batch is shorter, and goes by the plan for a longer one.
        key = tuple(None if leaf is None else (tuple(leaf.shape[1:]), str(leaf.dtype)) for leaf in tree.flatten(data))
        lengths = self.choices.setdefault(key, {})
        longer = [n for n in lengths if n >= length]
        if not longer:
            started = clock.perf_counter()
            own = predictions()
            planned = _planned(own, None, False)
            lengths[length] = ShapeChoice(Choice(planned, planned.micro_batch), own.saver())
            log_choice(logger, planned, started)
        return lengths[min(longer, default=length)]
