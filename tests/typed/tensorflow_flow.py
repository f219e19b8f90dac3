"""TensorFlow 2's documented flow with its types. Type checkers read this file, and nothing runs it."""

from typing import assert_type

import tensorflow as tf  # type: ignore[import-untyped]

import bigbatch.tensorflow as bb

x, y = tf.ones((96, 8)), tf.ones((96, 2))
w = tf.Variable(tf.zeros((8, 2)))
optimizer = tf.keras.optimizers.AdamW()

loss, grads = bb.value_and_grad(lambda b: tf.reduce_mean((b[0] @ w - b[1]) ** 2), (x, y), [w], micro_batch="auto")
acc = bb.Accumulator(optimizer, every=bb.items(4096), partial="carry", nonfinite="apply")
update = acc.apply_gradients(zip(grads, [w], strict=True), items=32, loss=loss)
assert_type(update, bb.Update)
assert_type(acc.flush(), bb.Update | None)
if tail := acc.flush():
    print(tail.micro_batches, tail.skipped)
