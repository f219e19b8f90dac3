"""TensorFlow 1's documented flow with its types. Type checkers read this file, and nothing runs it."""

from typing import assert_type

import tensorflow as tf  # type: ignore[import-untyped]

import bigbatch.tf1 as bb

v1 = tf.compat.v1
x = v1.placeholder(tf.float32, [None, 8])
loss = tf.reduce_mean(tf.linalg.matvec(x, v1.get_variable("w", [8])) ** 2)
acc = bb.Accumulator(v1.train.AdamOptimizer(1e-3), every=64, partial="apply")
train_op = acc.minimize(loss, items=tf.shape(x)[0])
with v1.Session() as session:
    session.run([train_op, acc.accumulate, acc.apply, acc.flush, acc.zero])
    assert_type(acc.last, bb.Update)
    update: bb.Update = session.run(acc.last)
    print(update.loss, update.skipped, session.run([acc.pending, acc.pending_items, acc.updates]))
