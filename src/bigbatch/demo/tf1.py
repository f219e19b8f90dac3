"""The demo in TensorFlow 1: a graph, a session, and the ops that a user would fetch.

A session has no split API. There the parts are driven by name: `accumulate` for each piece of the batch, then
`apply`.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

import bigbatch.tf1 as bb
from bigbatch.demo import Job, Result, Way

v1 = tf.compat.v1


class AdamW(v1.train.AdamOptimizer):
    """Adam with decoupled decay, which v1 has not: the variables shrink, then Adam steps."""

    def __init__(self, learning_rate: Any, weight_decay: float):
        super().__init__(learning_rate, name="AdamW")
        self.weight_decay = weight_decay

    def decay(self, grad: Any, var: Any) -> tf.Operation:
        """Shrinks the variable, of which `grad` is the gradient."""
        with tf.control_dependencies([grad]):  # or the forward pass may find the variable shrunk already
            rate = tf.cast(self._lr_t, var.dtype.base_dtype)
            return var.assign_sub(rate * self.weight_decay * var, read_value=False)

    def _resource_apply_dense(self, grad: Any, var: Any) -> Any:
        with tf.control_dependencies([self.decay(grad, var)]):
            return super()._resource_apply_dense(grad, var)


def train(way: Way, job: Job, advance: Callable[[int], None]) -> Result:
    """Trains one way. See `bigbatch.demo.Train`."""
    with tf.Graph().as_default(), v1.Session() as session:
        x, y, x_test, y_test = job.data
        inputs, labels = v1.placeholder(job.dtype, [None, x.shape[1]]), v1.placeholder(tf.int64, [None])
        layers = [tuple(v1.Variable(part) for part in pair) for pair in job.layers]
        logits = inputs
        for i, (kernel, bias) in enumerate(layers):
            logits = (tf.tanh(logits) if i else logits) @ kernel + bias
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits))

        updates = job.updates(job.micro_batch if way == "micro" else job.batch)
        rates = tf.constant([job.rate_at(k, updates) for k in range(updates)], job.dtype)
        step = v1.train.get_or_create_global_step()
        optimizer = AdamW(rates[tf.minimum(step, updates - 1)], job.weight_decay)
        acc = bb.Accumulator(optimizer, every=job.batch // job.micro_batch, clip_norm=job.clip_norm)
        if way in ("micro", "full"):
            gradients, variables = zip(*optimizer.compute_gradients(loss), strict=True)
            gradients, _ = tf.clip_by_global_norm(gradients, job.clip_norm)
            train_op = optimizer.apply_gradients(zip(gradients, variables, strict=True), step)
        else:
            train_op = acc.minimize(loss, step, items=tf.shape(inputs)[0])
        session.run(v1.global_variables_initializer())

        def feed(rows: np.ndarray) -> dict[Any, np.ndarray]:
            return {inputs: x[rows], labels: y[rows]}

        def plain(rows: np.ndarray) -> float:
            return session.run([loss, train_op], feed(rows))[0]

        def stream(rows: np.ndarray) -> float:
            for start in range(0, len(rows), job.micro_batch):
                session.run(train_op, feed(rows[start : start + job.micro_batch]))
            session.run(acc.flush)  # the last window of an epoch is not full; after a full one this does nothing
            return session.run(acc.last).loss

        def split(rows: np.ndarray) -> float:
            for start in range(0, len(rows), job.micro_batch):
                session.run(acc.accumulate, feed(rows[start : start + job.micro_batch]))
            session.run(acc.apply)
            return session.run(acc.last).loss

        update = {"micro": plain, "full": plain, "stream": stream, "split": split}[way]
        seen, seconds, losses = 0, 0.0, []
        for rows in job.batches(job.micro_batch if way == "micro" else job.batch):
            started = time.perf_counter()
            value = update(rows)
            seconds += time.perf_counter() - started
            seen += len(rows)
            losses.append((seen, float(value)))
            advance(len(rows))
        predicted = session.run(tf.argmax(logits, 1), {inputs: x_test})
        accuracy = float(np.mean(predicted == y_test))
        # The allocator of TensorFlow's CPU tells no peak.
        return Result(losses, accuracy, session.run(layers), None, seconds)
