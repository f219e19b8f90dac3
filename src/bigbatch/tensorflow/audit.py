"""`audit`: is accumulation exact for this loss and this batch?

`bigbatch.audit_experiments` has the experiments. Here is how TensorFlow makes a run that leaves nothing behind.
Variables have the dtype that they were made with, so it is made in that.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from bigbatch import errors
from bigbatch.audit import Audit
from bigbatch.audit_experiments import examine
from bigbatch.audit_probe import Examples, Run
from bigbatch.engines import randomness, tensorflow_rng
from bigbatch.tensorflow.batch import length_of, tensors
from bigbatch.tensorflow.checks import as_items, loss_and_items


def audit(loss_fn: Callable[[Any], Any], batch: Any, variables: Sequence[Any], *, micro_batch: int) -> Audit:
    """Says whether `bb.value_and_grad(loss_fn, batch, variables, …)` is the batch's own gradient, and if not, why.

    It compares the two, in the variables' own dtype, and finds the cause by experiment::

        print(bb.audit(loss_fn, (x, y), model.trainable_variables, micro_batch=8))
        # not exact: 2 of 4 parameters differ, the largest by 25%
        # - coupling: The loss couples examples: …

    The answer is about this batch. Give it one like those you train on: ragged where they are, with masks that differ.
    Some dozens of examples are enough; the whole batch must fit in memory, and 10 to 50 passes over it are made. Not to
    be called in a `tf.function`.

    Args:
        loss_fn: as for `bb.value_and_grad`: takes a micro-batch and returns its mean loss, or `(loss, items)`.
        batch: as for `bb.value_and_grad`.
        variables: what to differentiate with respect to.
        micro_batch: examples in a micro-batch; fewer than the batch holds.

    Returns:
        An `Audit`: `verdict`, `exact`, `causes`, `parameters`, `table()` and `figure(path)`.

    Raises:
        TypeError, ValueError: an argument, a loss or its items are not as described.

    Every variable that `loss_fn` reads or writes and the random state are put back as they were.
    """
    micro_batch = errors.check_micro_batch(micro_batch, auto=False)
    batch = tensors(batch)
    length = length_of(batch)
    if micro_batch >= length:
        raise errors.one_micro_batch(micro_batch, length)
    variables = list(variables)
    if not variables:
        raise ValueError("variables must hold at least one. Received: none. Pass model.trainable_variables.")
    with randomness.preserved(), tensorflow_rng.kept():
        return examine(AuditRunner(loss_fn, batch, variables, length, micro_batch))


class AuditRunner:
    """Runs of one loss function on one batch (see `audit_experiments`)."""

    def __init__(self, loss_fn: Callable[[Any], Any], batch: Any, variables: list[Any], length: int, micro_batch: int):
        self.loss_fn, self.batch, self.variables = loss_fn, batch, variables
        self.length, self.micro_batch = length, micro_batch
        self.dtype = min((tf.as_dtype(v.dtype) for v in variables), key=lambda dtype: dtype.size).name
        self.names = [f"{k}: {getattr(v, 'path', v.name)}" for k, v in enumerate(variables)]
        self.state = [(v, v.numpy()) for v in {id(v): v for v in [*variables, *self.used()]}.values()]

    def used(self) -> Sequence[Any]:
        """What a run reads or writes beside the variables it was given, such as moving averages and seeds."""
        part = tf.nest.map_structure(lambda x: None if x is None else x[: self.micro_batch], self.batch)

        def loss_fn() -> None:
            self.loss_fn(part)

        try:
            return tf.function(loss_fn).get_concrete_function().variables
        except (TypeError, ValueError, NotImplementedError):
            return []  # it runs eagerly only, and reads what it was given

    def gradient(
        self,
        parts: Sequence[Examples],
        *,
        seed: int,
        quiet: frozenset[str],
        fresh: bool = False,
        items: Any = None,
        scale: float = 1.0,
    ) -> dict[str, np.ndarray]:
        """Σ nᵢ·gᵢ / Σ nᵢ over the parts; a variable without a gradient has one of zero."""
        sums = {name: np.zeros(tuple(v.shape)) for name, v in zip(self.names, self.variables, strict=True)}
        count = 0.0
        with self.at_rest(seed) as reset:
            for k, rows in enumerate(parts):
                if fresh:
                    reset()
                with tf.GradientTape() as tape:
                    loss, n = self.forward(rows)
                    scaled = loss * scale
                n = n if items is None else items[k]
                count += n
                gradients = tape.gradient(scaled, self.variables)
                if all(grad is None for grad in gradients):
                    raise errors.loss_without_gradient(loss)
                for name, grad in zip(self.names, gradients, strict=True):
                    if grad is not None and n:
                        sums[name] += n * tf.cast(tf.convert_to_tensor(grad), tf.float64).numpy()
        return {name: total / (count * scale) for name, total in sums.items()}

    def loss(self, rows: Examples, *, seed: int, quiet: frozenset[str]) -> Run:
        """One forward pass over these rows."""
        with self.at_rest(seed):
            loss, items = self.forward(rows)
            return Run(float(loss), items)

    def forward(self, rows: Examples) -> tuple[tf.Tensor, float]:
        """The mean loss of these rows, and its items."""
        index = tf.constant(list(rows))
        result = self.loss_fn(tf.nest.map_structure(lambda x: None if x is None else tf.gather(x, index), self.batch))
        loss, items = loss_and_items(result)
        return loss, float(tf.reshape(as_items(len(rows) if items is None else items), ()))

    def sources(self, rows: Examples, seed: int, quiet: frozenset[str]) -> list[str]:
        """None: the activations of layers are not compared."""
        return []

    @contextlib.contextmanager
    def at_rest(self, seed: int) -> Iterator[Callable[[], None]]:
        """Everything as it was at the start, with random numbers from this seed."""

        def reset() -> None:
            for variable, value in self.state:
                # Keras draws from seeds in variables of this kind, which no seed of TensorFlow's reaches.
                moved = seed and value.dtype in (np.uint32, np.int64) and value.shape == (2,)
                variable.assign(value + np.asarray([seed, 0], value.dtype) if moved else value)

        tf.random.set_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            reset()
            yield reset
        finally:
            for variable, value in self.state:
                variable.assign(value)
