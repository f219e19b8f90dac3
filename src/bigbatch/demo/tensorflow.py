"""The demo in TensorFlow 2: the loops are what a user would write."""

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

import bigbatch.tensorflow as bb
from bigbatch.demo import Job, Result, Way


class Rates(tf.keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate of each update, which the optimizer counts."""

    def __init__(self, rates: list[float]):
        self.rates = tf.constant(rates)

    def __call__(self, step: int | tf.Tensor) -> tf.Tensor:
        """The rate at a step."""
        return self.rates[tf.minimum(tf.cast(step, tf.int32), len(self.rates) - 1)]


def train(way: Way, job: Job, advance: Callable[[int], None]) -> Result:
    """Trains one way. See `bigbatch.demo.Train`."""
    x, y, x_test, y_test = map(tf.constant, job.data)
    model = network(job)
    variables = model.trainable_variables
    updates = job.updates(job.micro_batch if way == "micro" else job.batch)
    optimizer = tf.keras.optimizers.AdamW(
        Rates([job.rate_at(k, updates) for k in range(updates)]),
        weight_decay=job.weight_decay,
        epsilon=1e-8,
        global_clipnorm=job.clip_norm,
    )
    acc = bb.Accumulator(optimizer, every=job.batch // job.micro_batch)

    def loss_fn(batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        inputs, labels = batch
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, model(inputs, training=True)))

    def gradient(batch: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            loss = loss_fn(batch)
        return loss, tape.gradient(loss, variables)

    @tf.function(reduce_retracing=True)
    def plain(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        loss, gradients = gradient((x, y))
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    @tf.function(reduce_retracing=True)
    def split(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        loss, gradients = bb.value_and_grad(loss_fn, (x, y), variables, micro_batch=job.micro_batch)
        optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return loss

    @tf.function(reduce_retracing=True)
    def feed(x: tf.Tensor, y: tf.Tensor) -> bb.Update:
        loss, gradients = gradient((x, y))
        return acc.apply_gradients(zip(gradients, variables, strict=True), items=tf.shape(x)[0], loss=loss)

    def stream(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        parts = [slice(start, start + job.micro_batch) for start in range(0, len(x), job.micro_batch)]
        updates = [feed(x[part], y[part]) for part in parts]
        return (acc.flush() or updates[-1]).loss  # the last window of an epoch is not full

    step = {"micro": plain, "full": plain, "stream": stream, "split": split}[way]
    seen, seconds, losses = 0, 0.0, []
    for rows in job.batches(job.micro_batch if way == "micro" else job.batch):
        started = time.perf_counter()
        loss = float(step(tf.gather(x, rows), tf.gather(y, rows)))
        seconds += time.perf_counter() - started
        seen += len(rows)
        losses.append((seen, loss))
        advance(len(rows))
    accuracy = float(np.mean(np.argmax(model(x_test), 1) == y_test.numpy()))
    # TensorFlow counts no memory on the CPU.
    return Result(losses, accuracy, layers(model), None, seconds)


def network(job: Job) -> tf.keras.Sequential:
    """The job's network, with its initial weights."""
    widths = [kernel.shape[1] for kernel, _ in job.layers]
    model = tf.keras.Sequential([tf.keras.layers.Input((job.layers[0][0].shape[0],), dtype=job.dtype)])
    for i, width in enumerate(widths):
        model.add(tf.keras.layers.Dense(width, "tanh" if i < len(widths) - 1 else None, dtype=job.dtype))
    model.set_weights([weight for layer in job.layers for weight in layer])
    return model


def layers(model: tf.keras.Sequential) -> list[tuple[np.ndarray, np.ndarray]]:
    """The network's weights as the job gave them."""
    kernel_and_bias = iter(model.get_weights())
    return list(zip(kernel_and_bias, kernel_and_bias, strict=True))
