"""The largest micro-batch that fits, predicted from the shapes in a traced graph: TensorFlow predicts no peak."""

import logging
import math
import time as clock
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_estimate import RESERVE, bytes_of, device_memory, is_out_of_memory, peak
from bigbatch.plan import Choice, Plan, budget, choose, log_choice, timed
from bigbatch.plan import fitting as plan_again
from bigbatch.tensorflow.batch import length_of, slice_of, spec_of, tensors
from bigbatch.tensorflow.checks import COUNT, check_dtype
from bigbatch.tensorflow.window import Task, Window, forward_backward, stored

# One line a choice, as a warning, which Python shows where logging was not configured: the choice decides how fast
# training is, and the user did not make it.
logger = logging.getLogger("bigbatch.tensorflow")


def plan(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    variables: Sequence[Any],
    *,
    memory: str | float | None = None,
    time: bool = False,
    dtype: Any = tf.float32,
) -> Plan:
    """The largest micro-batch that fits, and why, without running out of memory to find out.

    For each size `loss_fn` and its gradient are traced into a graph, which runs nothing; the tensors' lives are read
    off it, in the order in which the operations were made. TensorFlow may run them in another order, and puts some in
    one: the reserve is for that::

        plan = bb.plan(loss_fn, (x, y), model.trainable_variables, memory="8GiB")
        plan.show()

    Args:
        loss_fn: as `value_and_grad` takes it. It is traced for each size that is looked at.
        batch: as `value_and_grad` takes it, of known shape.
        variables: as `value_and_grad` takes them.
        memory: what everything held together may reach: a size ("8GiB", or bytes as an integer); a fraction
            (0 < float ≤ 1) of what is free; by default what is free less a quarter. On a CPU free is what the machine,
            the process's cgroups and its ulimits leave.
        time: also times one micro-batch, as a graph, of the largest size that fits, its half, its quarter, …, and takes
            the fastest. Not inside a `tf.function`.
        dtype: as `value_and_grad` takes it.

    Returns:
        The `bigbatch.plan.Plan`: `micro_batch`, `candidates`, `budget`, `show()` and `save("plan.png")`.

    Raises:
        TypeError, ValueError: an argument is not as described, or no example fits `memory`.
        MemoryError: no example fits what is free.

    Twice the variables are kept free for the state that an optimizer makes at its first step.
    """
    if time and not tf.executing_eagerly():
        raise ValueError("time=True runs micro-batches, and a graph is being built. Call plan outside the tf.function.")
    return _plan(_Traces(loss_fn, batch, list(variables), check_dtype(dtype)), memory, time)


class _Traces:
    """Predictions for one loss function and batch, and the variables that the loss function assigns."""

    def __init__(self, loss_fn: Callable[[Any], Any], batch: Any, variables: list[Any], dtype: Any):
        self.loss_fn, self.variables, self.dtype = loss_fn, variables, dtype
        self.batch = tensors(batch)
        length = length_of(self.batch)
        if not isinstance(length, int):
            raise ValueError(
                "A plan needs the batch's length while the graph is built. Received: a batch of unknown length. "
                "Give the tf.function an input_signature that says it, or pass micro_batch as a number."
            )
        self.length = length
        self.held = sum(bytes_of(v.shape, tf.as_dtype(v.dtype)) for v in variables)
        self.assigned: list[Any] = []

    def needs(self, size: int) -> int:
        """Bytes that a window of micro-batches of `size` examples takes beside what is held."""
        graph = self._traced(size).graph
        trained = {id(v) for v in self.variables} | {id(getattr(v, "value", None)) for v in self.variables}
        self.assigned = [v for v in graph.variables if id(v) not in trained]
        cut = sum(bytes_of(spec_of(leaf, size).shape, leaf.dtype) for leaf in self._leaves())
        # The micro-batch is a copy, and in a window of several the sums are there beside the gradients.
        return cut + peak(graph) + (self.held if size < self.length else 0)

    def seconds(self, size: int) -> float:
        """Of one forward and backward: the least of three, after one."""
        run, least = self._traced(size), math.inf
        leaves = [leaf for leaf in tf.nest.flatten(slice_of(self.batch, 0, size)) if leaf is not None]
        kept = [(v, tf.identity(v)) for v in self.assigned]
        for _ in range(4):
            started = clock.perf_counter()
            run(*leaves, tf.zeros((), COUNT)).loss.numpy()  # waits
            least = min(least, clock.perf_counter() - started)
        for variable, before in kept:
            variable.assign(before)
        return least

    def _leaves(self) -> list[tf.Tensor]:
        return [leaf for leaf in tf.nest.flatten(self.batch) if leaf is not None]

    def _traced(self, size: int) -> Any:
        task, refused = Task(self.loss_fn, self.variables, self.dtype, size), []

        def step(part: Any, unit: tf.Tensor) -> Window:
            try:
                return stored(task, forward_backward(task, part, unit))
            except (TypeError, ValueError) as error:
                refused.append(error)
                raise

        spec = tf.nest.map_structure(lambda leaf: None if leaf is None else spec_of(leaf, size), self.batch)
        try:
            return tf.function(step).get_concrete_function(spec, tf.TensorSpec((), COUNT))
        except (TypeError, ValueError) as error:
            # AutoGraph raises another, whose text begins with a place in the code.
            raise (refused or [error])[0] from None


def _plan(traces: _Traces, memory: Any, time: bool) -> Plan:
    allowed = budget(memory, device_memory(memory), keep=2 * traces.held, reserve=RESERVE)
    notes = ("The runtime may order and fuse the graph's operations otherwise.",)
    found = choose(
        traces.needs, traces.length, allowed, lambda: "predicted from the traced graph", notes=notes, given=memory
    )
    return timed(found, traces.needs, traces.seconds) if time else found


def fitting(window: Callable[[int], Any], loss_fn: Any, batch: Any, variables: list[Any], dtype: Any) -> Any:
    """`window(micro_batch)` with the micro-batch that fits, planned once for a loss function and a shape of batch.

    In a `tf.function` that is when it is traced. Outside it also survives an out-of-memory: what `loss_fn` assigned is
    given back, and the window is run again with micro-batches of half the size, which it goes on with.
    """
    choice = _choice(loss_fn, batch, variables, dtype)
    if not tf.executing_eagerly():
        return window(choice.micro_batch)

    def save() -> Callable[[], None]:
        kept = [(v, tf.identity(v)) for v in choice.assigned]

        def restore() -> None:
            for variable, before in kept:
                variable.assign(before)

        return restore

    return plan_again(window, choice, choice.plan.batch, is_out_of_memory, logger, save)


@dataclass
class _Choice(Choice):
    """For one loss function and one shape of batch, with the variables that the loss function assigns."""

    assigned: list[Any]


# Plans, for as long as their loss function lives. A cache: without it every call outside a tf.function would trace.
_remembered: weakref.WeakKeyDictionary[Any, dict[Any, _Choice]] = weakref.WeakKeyDictionary()


def _choice(loss_fn: Any, batch: Any, variables: list[Any], dtype: Any) -> _Choice:
    leaves = [leaf for leaf in tf.nest.flatten(batch) if leaf is not None]
    # A bound method is made anew each time it is named.
    function, owner = getattr(loss_fn, "__func__", loss_fn), id(getattr(loss_fn, "__self__", None))
    key = tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves), dtype, owner, tuple(id(v) for v in variables)
    # Inside a tf.function it is planned when that is traced, and the variables it assigns are its graph's.
    choices = _remembered.setdefault(function, {}) if tf.executing_eagerly() else {}
    if key not in choices:
        started = clock.perf_counter()
        traces = _Traces(loss_fn, batch, variables, dtype)
        found = _plan(traces, None, False)
        choices[key] = _Choice(found, found.micro_batch, traces.assigned)
        log_choice(logger, found, started)
    return choices[key]
