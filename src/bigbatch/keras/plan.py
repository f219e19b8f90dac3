"""The micro-batch that fits: planned for each shape of batch that `fit` sees, lowered when memory runs out anyway.

A backend's own half is in `memory_<backend>.py`: what a size needs, and a step in which the micro-batches are added up
apart from the update, so that an out-of-memory can take the one back and never comes near the other.
"""

import importlib
import logging
import time as clock
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
from keras import tree

# Not public; as in stream.py. tests/keras/test_private.py fails when it moves.
from keras.src.trainers.data_adapters import get_data_adapter

from bigbatch import errors
from bigbatch.keras import batch
from bigbatch.keras.checks import check_model
from bigbatch.plan import Plan, budget, choose, halved, not_even_one, timed

# One line a choice, by logging and as a warning, which is what is seen where logging was never set up: the choice
# decides how fast training is, and was made on the user's behalf.
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
    runs nothing, and its tensors' lives are read off. On JAX the step is compiled for each size, and the compiler says
    what the program takes. On PyTorch the model is called on tensors that have shapes and no contents; a model that
    asks for values on the way is run on 4 and on 8 examples instead, with a straight line through the two, and the plan
    says so::

        plan = bb.plan(model, x, y, batch_size=2048, memory="8GiB")
        plan.show()
        bb.accumulate(model, micro_batch=plan.micro_batch)

    Args:
        model: a compiled model. It is built if it is not yet, as `fit` would.
        x: arrays or a data set, as `fit` takes them. Of a data set the first batch is what is planned for.
        y: targets, as `fit` takes them.
        sample_weight: as `fit` takes it.
        batch_size: of arrays, the batch that one update is to see; by default all of them, as in `train_on_batch`.
        memory: what everything held together may reach: a size ("8GiB", or bytes as an integer); a fraction
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
    return _planned(_own().Predictions(model, data), memory, time)


def open_door(model: Any) -> None:
    """Gives the model a train function that chooses the micro-batch by what `fit` hands it."""

    def make_train_function(force: bool = False) -> None:
        if model.train_function is None or force:
            model.train_function = _stepping(model, _own().auto_step(model, Fitting()))

    model.make_train_function = make_train_function


def _own() -> Any:
    """The half of this that belongs to the backend that Keras runs on."""
    return importlib.import_module(f"bigbatch.keras.backends.{keras.backend.backend()}.plan")


def check_one_device(model: Any) -> None:
    """Refuses to plan for a model that is spread over devices."""
    replicas = model.distribute_strategy.num_replicas_in_sync if keras.backend.backend() == "tensorflow" else 1
    if replicas > 1 or keras.distribution.distribution() is not None:
        raise ValueError('micro_batch="auto" is not planned across devices yet. Pass a number.')


def _stepping(model: Any, step: Callable[..., Any]) -> Callable[..., Any]:
    """A train function as Keras calls it, from a step on one batch, which must be at hand to be done again."""

    def train_function(*args: Any) -> Any:
        *state, source = args  # JAX's comes with the model's state
        source, result = iter(source), None
        for i in range(model.steps_per_execution):
            try:
                data = next(source)
            except StopIteration:
                if i == 0:
                    raise
                break
            result = step(data, *state)
            state = result[1:] if state else state
        return result

    return train_function


def _planned(predictions: Any, memory: Any, time: bool) -> Plan:
    allowed = budget(memory, predictions.device_memory(memory), reserve=predictions.reserve)
    found = choose(
        predictions.needs,
        predictions.length,
        allowed,
        predictions.how,
        notes=predictions.notes(),
        given=memory,
        **predictions.search,
    )
    return timed(found, predictions.needs, predictions.seconds) if time else found


@dataclass
class _Choice:
    """What is remembered for one shape of batch.

    Attributes:
        plan: the plan it was made by.
        micro_batch: the most examples that a micro-batch may have.
        keep: notes what a window writes to, and returns a function that gives it back.
    """

    plan: Plan
    micro_batch: int
    keep: Callable[[], Callable[[], None]]

    def size(self, length: int) -> int:
        """For a batch of this length: in as few micro-batches as may be, and those of one size."""
        return -(-length // -(-length // self.micro_batch))

    def lower(self, length: int) -> None:
        """To half the size: twice as many micro-batches."""
        failed = self.size(length)
        self.micro_batch = halved(length, failed)
        logger.warning(
            'micro_batch="auto": out of memory at %s; the window is done again with %s.',
            f"{failed:,}",
            f"{self.micro_batch:,}",
        )


class Fitting:
    """The choices for one model, for as long as its train function lives: until it is compiled again."""

    def __init__(self) -> None:
        self.choices: dict[Any, dict[int, _Choice]] = {}

    def __call__(self, data: Any, predictions: Callable[[], Any], attempt: Callable[[int], Any]) -> Any:
        """Runs `attempt(micro_batch)` with the micro-batch that fits.

        After an out-of-memory what it wrote to is given back, and it is done again with micro-batches of half the size:
        what comes out is, bit for bit, what the smaller micro-batch would have made of it in the first place.

        Args:
            data: the batch.
            predictions: makes the backend's `Predictions` for it.
            attempt: adds the micro-batches up.

        Raises:
            Whatever `attempt` raises that is no out-of-memory; an out-of-memory of micro-batches of 1, with a note.
        """
        length = batch.check(data) or 0
        choice = self._choice(data, length, predictions)
        while True:
            size, give_back = choice.size(length), choice.keep()
            try:
                return attempt(size)
            except Exception as error:
                if not _own().is_out_of_memory(error):
                    raise
                if size == 1:
                    error.add_note(not_even_one(choice.plan))
                    raise
            # Only here, outside the except, are the failed frames gone and with them the tensors that they held.
            give_back()
            choice.lower(length)

    def _choice(self, data: Any, length: int, predictions: Callable[[], Any]) -> _Choice:
        # An epoch's last batch is shorter, and goes by the plan for a longer one.
        key = tuple(None if leaf is None else (tuple(leaf.shape[1:]), str(leaf.dtype)) for leaf in tree.flatten(data))
        lengths = self.choices.setdefault(key, {})
        longer = [n for n in lengths if n >= length]
        if not longer:
            started = clock.perf_counter()
            made = predictions()
            found = _planned(made, None, False)
            lengths[length] = _Choice(found, found.micro_batch, made.keeping())
            logger.warning('micro_batch="auto": %s in %.1f s.', found, clock.perf_counter() - started)
        return lengths[min(longer, default=length)]
