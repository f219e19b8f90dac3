"""The micro-batch that fits on the JAX backend, by the compiler's memory analysis of Keras's step.

Plain `fit` donates the model's state to its step, and the buffers of a step that failed are gone. So here one program
adds the micro-batches up, to which nothing is donated, and another makes the update.
"""

import functools
import math
import time as clock
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bigbatch import host
from bigbatch.engines import jax_estimate
from bigbatch.engines.jax_estimate import is_out_of_memory as is_out_of_memory
from bigbatch.keras import batch, losses
from bigbatch.keras.backends.jax.window import State, add_up, cut, update
from bigbatch.plan import RESERVE


class Programs:
    """A window's two programs: the sums of a batch's micro-batches, and the update, which the state is donated to."""

    def __init__(self, model: Any):
        terms: list[losses.Term] = []

        def make_sums(size: int, state: Any, data: Any) -> Any:
            return add_up(model, State(*state), data, cut(data, size), terms)

        def make_update(state: Any, sums: Any, examples: Any) -> Any:
            return update(model, terms, examples, State(*state), sums)

        self.sums, self.update = jax.jit(make_sums, static_argnums=0), jax.jit(make_update, donate_argnums=0)
        if model.run_eagerly or not model.jit_compile:
            self.run_sums, self.run_update = make_sums, make_update
        else:
            self.run_sums, self.run_update = self.sums, self.update


def auto_step(model: Any, auto: Any) -> Callable[[Any, Any], tuple[dict[str, Any], Any]]:
    """A step on one batch, cut by `auto`."""
    programs = Programs(model)

    def step(data: Any, state: Any) -> tuple[dict[str, Any], Any]:
        data = _arrays(data)

        def run(size: int) -> Any:
            # JAX raises an error where the host waits for the result. After the update that would be too late.
            return jax.block_until_ready(programs.run_sums(size, state, data))

        predictions = functools.partial(Predictions, model, data, state, programs)
        sums, non_trainable, metrics = auto(data, predictions, run)
        trainable, _, optimizer_variables, _ = state
        state = trainable, non_trainable, optimizer_variables, metrics
        return programs.run_update(state, sums, batch.leaves(data)[0].shape[0])

    return step


class Predictions:
    """What the sizes of one batch's micro-batches need."""

    search = {"tries": jax_estimate.TRIES, "enough": jax_estimate.ENOUGH}  # noqa: RUF012
    reserve = RESERVE

    def __init__(self, model: Any, data: Any, state: Any = None, programs: Programs | None = None):
        if state is None:
            # Not public. tests/keras/test_private.py fails when it moves.
            model._symbolic_build(data_batch=data)
            kinds = model.trainable_variables, model.non_trainable_variables, model.optimizer.variables
            state = tuple([v.value for v in variables] for variables in (*kinds, model.metrics_variables))
        self.programs, self.state, self.data = programs or Programs(model), state, _arrays(data)
        self.length = batch.leaves(data)[0].shape[0]
        self.compiled = 0

    def device_memory(self, memory: Any) -> host.Memory:
        """What is in use and free."""
        return jax_estimate.device_memory()

    def needs(self, size: int) -> int:
        """Bytes that an update with micro-batches of `size` examples takes beside what is in use."""
        state, data = _abstract(self.state), _abstract(self.data)
        sums = self.programs.sums.trace(size, state, data)
        self.compiled += 1
        outputs, non_trainable, metrics = _abstract(sums.out_info)
        between = jax_estimate.bytes_of(sums.out_info)
        trainable, _, optimizer_variables, _ = state
        state = trainable, non_trainable, optimizer_variables, metrics
        update = self.programs.update.trace(state, outputs, self.length)
        return max(jax_estimate.needs_of(sums), between + jax_estimate.needs_of(update))

    def how(self) -> str:
        """Where the predictions come from."""
        return f"by the compiler's memory analysis of {self.compiled} programs"

    def notes(self) -> tuple[str, ...]:
        """What to know about the predictions."""
        return ()

    def saver(self) -> Callable[[], Callable[[], None]]:
        """Nothing has to be restored: the sums' program changes nothing."""
        return lambda: lambda: None

    def seconds(self, size: int) -> float:
        """Of one forward and backward: the least of three, after one."""
        least = math.inf
        for _ in range(4):
            started = clock.perf_counter()
            jax.block_until_ready(self.programs.sums(size, self.state, self.data))
            least = min(least, clock.perf_counter() - started)
        return least * size / self.length


def _arrays(data: Any) -> Any:
    """On the device, where the batch is before it is cut."""
    return batch.nest(batch.unpack(data), [jnp.asarray(leaf) for leaf in batch.leaves(data)])


def _abstract(nested: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nested)
