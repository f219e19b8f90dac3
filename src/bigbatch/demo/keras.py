"""The demo in Keras, on the backend that KERAS_BACKEND names: `fit`, as a user would call it.

With --float64, Keras multiplies in float64 on TensorFlow only; on JAX and PyTorch it narrows products to float32.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

import bigbatch.keras as bb
from bigbatch.audit import Audit
from bigbatch.demo import Job, Result, Way


class Losses(keras.callbacks.Callback):
    """Each update's own loss, where Keras logs the epoch's mean so far."""

    def __init__(self, sizes: list[int], advance: Callable[[int], None]):
        super().__init__()
        self.sizes, self.advance = sizes, advance
        self.losses: list[tuple[int, float]] = []
        self.seen = 0
        self.epoch = (0, 0.0)  # examples of this epoch, and the sum of their losses

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Keras starts its mean anew."""
        self.epoch = (0, 0.0)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Notes one update's loss."""
        size = self.sizes[len(self.losses)]
        examples, total = self.epoch
        self.epoch = (examples + size, float(logs["loss"]) * (examples + size))
        self.seen += size
        self.losses.append((self.seen, (self.epoch[1] - total) / size))
        self.advance(size)


def train(way: Way, job: Job, advance: Callable[[int], None]) -> Result:
    """Trains one way. See `bigbatch.demo.Train`."""
    with _floatx(job.dtype):
        return _train(way, job, advance)


def _train(way: Way, job: Job, advance: Callable[[int], None]) -> Result:
    x, y, x_test, y_test = job.data
    sizes = [len(rows) for rows in job.batches(job.micro_batch if way == "micro" else job.batch)]
    model: Any = network(job)
    schedule: Any = keras.optimizers.schedules.CosineDecay(job.rate, decay_steps=len(sizes))
    model.compile(
        keras.optimizers.AdamW(
            schedule,
            weight_decay=job.weight_decay,
            epsilon=1e-8,
            global_clipnorm=job.clip_norm,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    if way == "split":
        bb.accumulate(model, micro_batch=job.micro_batch)
    elif way == "stream":
        bb.accumulate(model, every=job.batch // job.micro_batch, noise=1)

    yielded = job.micro_batch if way in ("micro", "stream") else job.batch
    losses = Losses(sizes, advance)
    started = time.perf_counter()
    model.fit(
        ((x[rows], y[rows]) for rows in job.batches(yielded)),
        shuffle=False,  # the job has shuffled
        steps_per_epoch=job.updates(yielded) // job.epochs,
        epochs=job.epochs,
        callbacks=[losses],
        verbose=0,
    )
    seconds = time.perf_counter() - started
    accuracy = float(np.mean(np.argmax(model.predict(x_test, verbose=0), 1) == y_test))
    advice = None
    if way == "stream":
        advice = str(bb.advice(bb.noise_scale(model), batch=job.batch, micro_batch=job.micro_batch, beta2=0.999))
    # Keras counts no memory.
    return Result(losses.losses, accuracy, layers(model), None, seconds, advice)


def audit(job: Job) -> Audit:
    """Of the job's network with a BatchNormalization put in, on 64 examples: what accumulation cannot make exact."""
    with _floatx(job.dtype):
        x, y = (part[:64] for part in job.data[:2])
        inputs = keras.Input((x.shape[1],))
        first, *others = network(job).layers
        outputs = keras.layers.BatchNormalization(name="batch_normalization")(first(inputs))
        for layer in others:
            outputs = layer(outputs)
        model: Any = keras.Model(inputs, outputs)
        model.compile("adamw", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return bb.audit(model, x, y, micro_batch=16)


def network(job: Job) -> keras.Sequential:
    """The job's network, with its initial weights."""
    model = keras.Sequential([keras.Input((job.layers[0][0].shape[0],))])
    for kernel, _ in job.layers[:-1]:
        model.add(keras.layers.Dense(kernel.shape[1], "tanh"))
    model.add(keras.layers.Dense(job.layers[-1][0].shape[1]))
    model.set_weights([weight for layer in job.layers for weight in layer])
    return model


def layers(model: keras.Sequential) -> list[tuple[np.ndarray, np.ndarray]]:
    """The network's weights as the job gave them."""
    kernel_and_bias = iter(model.get_weights())
    return list(zip(kernel_and_bias, kernel_and_bias, strict=True))


@contextlib.contextmanager
def _floatx(dtype: str) -> Iterator[None]:
    """Everything that Keras makes has this type."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        if keras.backend.backend() == "jax":
            import jax

            with jax.enable_x64(dtype == "float64"):
                yield
        else:
            yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])
