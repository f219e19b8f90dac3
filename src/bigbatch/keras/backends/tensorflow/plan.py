"""The micro-batch that fits on the TensorFlow backend, predicted from the traced graph of a micro-batch."""

import functools
import math
import time as clock
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from bigbatch import host
from bigbatch.engines import tensorflow_estimate
from bigbatch.engines.tensorflow_estimate import bytes_of, peak
from bigbatch.engines.tensorflow_estimate import is_out_of_memory as is_out_of_memory
from bigbatch.keras import batch, losses
from bigbatch.keras.backends.tensorflow.steps import split_step
from bigbatch.keras.backends.tensorflow.update import update
from bigbatch.keras.backends.tensorflow.window import add_up, build, micro_step


def auto_step(model: Any, auto: Any) -> Callable[[Any], dict[str, Any]]:
    """A step on one batch, cut by `auto`: one graph adds up, and another makes the update."""
    terms: list[losses.Term] = []
    graph: Any = functools.partial(tf.function, jit_compile=model.jit_compile, autograph=False)

    @functools.cache
    def sums(size: int) -> Any:
        def added(data: Any) -> Any:
            window, unit, terms[:] = split_step(model, size, add_up)(data)
            return window, unit

        return added if model.run_eagerly else graph(added)

    def updated(window: Any, unit: Any) -> dict[str, Any]:
        return update(model, window, unit, terms)

    finish = updated if model.run_eagerly else graph(updated)

    def step(data: Any) -> dict[str, Any]:
        data = _tensors(data)
        return finish(*auto(data, functools.partial(Predictions, model, data), lambda size: sums(size)(data)))

    return step


def _tensors(data: Any) -> Any:
    def tensor(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, tf.experimental.Optional):  # as Keras has where a data set has None
            return None
        # What is not dense is refused where the batch is checked.
        return leaf if isinstance(leaf, tf.RaggedTensor | tf.SparseTensor) else tf.convert_to_tensor(leaf)

    return keras.tree.map_structure(tensor, batch.unpack(data))


class Predictions:
    """What the sizes of one batch's micro-batches need."""

    search: dict[str, Any] = {}  # noqa: RUF012
    reserve = tensorflow_estimate.RESERVE

    def __init__(self, model: Any, data: Any):
        self.model, self.data = model, _tensors(data)
        build(model, self.data)
        self.leaves = batch.leaves(self.data)
        self.length = self.leaves[0].shape[0]
        self.written: list[Any] = []

    def device_memory(self, memory: Any) -> host.Memory:
        """What is in use and free."""
        return tensorflow_estimate.device_memory(memory)

    def needs(self, size: int) -> int:
        """Bytes that a window of micro-batches of `size` examples takes beside what is in use."""
        traced = self._traced(size)
        trained = {id(v.value) for v in self.model.trainable_variables}
        self.written = [v for v in traced.graph.variables if id(v) not in trained]
        gradients = [g for g in tf.nest.flatten(traced.structured_outputs.gradients) if g is not None]
        cut = sum(bytes_of((size, *leaf.shape[1:]), leaf.dtype) for leaf in self.leaves)
        # The micro-batch is a copy, and in a window of more than one the sums exist beside the gradients.
        sums = sum(bytes_of(g.shape, g.dtype) for g in gradients) if size < self.length else 0
        return cut + peak(traced.graph) + sums

    def how(self) -> str:
        """Where the predictions come from."""
        return "predicted from the traced graph"

    def notes(self) -> tuple[str, ...]:
        """What to know about the predictions."""
        return ("The runtime may order and fuse the graph's operations otherwise.",)

    def saver(self) -> Callable[[], Callable[[], None]]:
        """A function that saves what a window writes to, in one call; it returns one that restores it."""
        written = self.written
        read = tf.function(lambda: [tf.identity(v) for v in written])

        def save() -> Callable[[], None]:
            values = read()

            def restore() -> None:
                for variable, value in zip(written, values, strict=True):
                    variable.assign(value)

            return restore

        return save

    def seconds(self, size: int) -> float:
        """Of one forward and backward: the least of three, after one."""
        run, least = self._traced(size), math.inf
        cut, restore = [leaf[:size] for leaf in self.leaves], self.saver()()
        for _ in range(4):
            started = clock.perf_counter()
            run(cut, tf.zeros([0], self.model._loss_tracker.dtype)).losses[0].numpy()  # waits
            least = min(least, clock.perf_counter() - started)
        restore()
        return least

    def _traced(self, size: int) -> Any:
        take = tf.function(micro_step(self.model, self.data, []), autograph=False)
        specs = [tf.TensorSpec([size, *leaf.shape[1:]], leaf.dtype) for leaf in self.leaves]
        return take.get_concrete_function(specs, tf.TensorSpec([0], self.model._loss_tracker.dtype))
