"""The variables of a window at the stream API: how they are made, set when a window opens, and saved."""

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import done
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.tensorflow.accumulators import LOCAL, DenseSum, SparseSum, description, kind
from bigbatch.tensorflow.checks import COUNT, widened
from bigbatch.tensorflow.guard import Guard
from bigbatch.tensorflow.noise import Meter
from bigbatch.tensorflow.seal import Seal, check_sum


class State(tf.Module):
    """An optimizer's window, in variables whose names here are their names in a checkpoint."""

    def __init__(self, optimizer: Any, every: Any, dtype: Any, nonfinite: str, meter: Meter | None, name: str | None):
        super().__init__(name=name)
        self.optimizer, self.every, self.dtype, self.nonfinite = optimizer, every, dtype, nonfinite
        self._distributed = tf.distribute.has_strategy()
        self._strategy = tf.distribute.get_strategy()
        once = {"trainable": False, "aggregation": tf.VariableAggregation.ONLY_FIRST_REPLICA}
        self._index = tf.Variable(tf.zeros((), tf.int64), **once)
        # Negative while a call runs, so that the next call sees where one was cut short.
        self._micro_batches = tf.Variable(tf.zeros((), tf.int64), **once)
        self._unit = tf.Variable(tf.ones((), COUNT), trainable=False)
        self._items = tf.Variable(tf.zeros((), COUNT), **LOCAL)
        self._loss = tf.Variable(tf.zeros((), COUNT), **LOCAL)
        self._sums = []
        self._meter = meter
        self._guard = Guard(**once)
        self._seal = Seal(self._state)
        self._host = _Host()

    @property
    def pending(self) -> tf.Tensor:
        """How many micro-batches the open window holds, an int64 scalar."""
        return tf.maximum(tf.convert_to_tensor(self._micro_batches), 0)

    @property
    def index(self) -> tf.Tensor:
        """How many updates have been made, and so the index of the next, an int64 scalar."""
        return tf.convert_to_tensor(self._index)

    def reset(self) -> None:
        """Forgets the open window. Its sums are set to zero when the next one opens."""
        self._micro_batches.assign(0)

    def _build_optimizer(self, variables: list[Any]) -> None:
        """Keras optimizers make their slots here: a conditional, in which they make the update, may make none."""
        if not getattr(self.optimizer, "built", True):
            self._lifted(lambda: self.optimizer.build(variables))

    def _grow(self, new: list[tuple[Any, bool]]) -> None:
        """Makes sums for the variables that have none yet; with each comes whether its gradient is sparse."""
        new = [(v, sparse) for v, sparse in new if id(v) not in self._host.places]
        if not new:
            return
        if self._host.traced:
            raise ValueError(
                f"{new[0][0].name} had no gradient when apply_gradients was first traced, and has one now. "
                "Graphs traced before would leave it out. Call build(variables) before the first apply_gradients."
            )
        xla = under_xla()

        def make() -> None:
            for v, sparse in new:
                shape = tf.TensorShape(v.shape)
                cls = DenseSum if self._distributed else kind(shape, sparse and not xla)
                with contextlib.nullcontext() if self._distributed else tf.device(v.handle.device):
                    one = cls(shape, widened(v.dtype, self.dtype))
                if len(self._sums) < len(self._seal.sums):
                    check_sum(len(self._sums), self._seal.sums[len(self._sums)], description(one))
                self._host.places[id(v)] = len(self._sums)
                self._host.variables.append(v)
                self._sums.append(one)
            self._host.graphs.clear()

        self._lifted(make)

    def _forget(self, count: int, traced: bool) -> None:
        """After an error: removes the sums after the first `count`, and the graphs that use them."""
        if len(self._sums) > count:
            for v in self._host.variables[count:]:
                del self._host.places[id(v)]
            del self._host.variables[count:]
            self._sums = self._sums[:count]  # a list that shrinks in place could not be saved any more
            self._host.traced = traced
            self._host.graphs.clear()

    def _lifted(self, make: Callable[[], None]) -> None:
        """Makes variables outside the graph that is being traced, and across replicas."""

        def lifted(strategy: tf.distribute.Strategy | None = None) -> None:
            with tf.init_scope(), strategy.scope() if strategy else contextlib.nullcontext():
                make()

        if self._distributed and not tf.distribute.in_cross_replica_context():
            tf.distribute.get_replica_context().merge_call(lifted)
        else:
            lifted()

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says of itself. The host waits."""
        counts = {"index": self._index, "micro_batches": self._micro_batches}
        numbers = {"items": self._items, "unit": self._unit, "loss": self._loss}
        return {
            **{name: int(tf.convert_to_tensor(v)) for name, v in counts.items()},
            **{name: float(tf.convert_to_tensor(v)) for name, v in numbers.items()},
            "sums": [description(one) for one in self._sums],
        }

    def _open(self) -> tf.Tensor:
        """Begins a window: assigns zeros, so that nothing of an earlier one, such as a NaN, is ever added to."""
        cleared = [one.clear() for one in self._sums]
        counts = [self._items.assign(0, read_value=False), self._loss.assign(0, read_value=False)]
        noted = None
        if self._may_be_disturbed() and not self._distributed:
            noted = self._note() if under_xla() else as_one_operation(self._note)()
        return done(cleared, counts, noted)

    def _note(self) -> tf.Tensor:
        """Notes the optimizer's and the variables' values, for `Guard.moved`."""
        return done(self._guard.open(self.optimizer, self._host.variables, self._dense()))

    def _may_be_disturbed(self) -> bool:
        """Whether others can act inside a window: one of a single micro-batch opens and closes in one call."""
        return self.every != 1

    def _dense(self) -> list[bool]:
        return [not isinstance(one, SparseSum) for one in self._sums]


def as_one_operation(work: Callable[..., Any]) -> Any:
    """Calls a function in a graph as one operation.

    TensorFlow visits every operation of a conditional's branch, also of one that is not taken.
    """
    return tf.function(work, experimental_attributes={"_noinline": True})


class _Host:
    """Python's own side of an Accumulator, which checkpoints and SavedModels must not find."""

    def __init__(self):
        self.variables: list[Any] = []  # keeps them alive, so that an id stays theirs
        self.places: dict[int, int] = {}  # of each variable's sum, by the variable's id
        self.traced = False
        self.planned: Any = None  # `every`, where that is a function
        self.graphs: dict[str, Any] = {}  # of calls from outside a tf.function, for the sums that there are

    def graph(self, work: Callable[..., Any]) -> Any:
        """A method as one graph, traced once for the sums that there are."""
        if work.__name__ not in self.graphs:
            self.graphs[work.__name__] = tf.function(work)
        return self.graphs[work.__name__]
