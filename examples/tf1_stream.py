"""A session yields micro-batches of 16, and every 64 of them make one update.

python examples/tf1_stream.py
"""

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import bigbatch.tf1 as bb

v1 = tf.compat.v1
pixels, labels = load_digits(return_X_y=True)

with tf.Graph().as_default():
    v1.set_random_seed(0)
    x, y = v1.placeholder(tf.float32, [None, 64]), v1.placeholder(tf.int64, [None])
    hidden = tf.tanh(x @ v1.get_variable("w1", [64, 128]) + v1.get_variable("b1", initializer=tf.zeros(128)))
    logits = hidden @ v1.get_variable("w2", [128, 10]) + v1.get_variable("b2", initializer=tf.zeros(10))
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))

    step = v1.train.get_or_create_global_step()  # counts updates: 40, not 2,260 micro-batches
    optimizer = v1.train.AdamOptimizer(v1.train.cosine_decay(1e-2, step, decay_steps=40))
    acc = bb.Accumulator(optimizer, every=64, clip_norm=1.0)
    train_op = acc.minimize(loss, step, items=tf.shape(x)[0])

    with v1.Session() as session:
        session.run(v1.global_variables_initializer())

        def show(epoch):
            update = session.run(acc.last)
            print(f"epoch {epoch:2d}  update {update.index:2d}  {update.items:.0f} examples  loss {update.loss:.4f}")

        rng = np.random.default_rng(0)
        for epoch in range(20):
            rows = rng.permutation(len(labels))
            for start in range(0, len(rows), 16):
                part = rows[start : start + 16]
                _, pending = session.run([train_op, acc.pending], {x: pixels[part] / 16, y: labels[part]})
                if pending == 63:  # as the run found it: this was the 64th
                    show(epoch)
            session.run(acc.flush)  # the last 49 micro-batches of the epoch are a window of their own
            show(epoch)
        print(f"{session.run(step)} updates made, {session.run(acc.pending)} micro-batches pending")
