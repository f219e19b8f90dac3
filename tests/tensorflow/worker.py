"""One of two workers of test_multi_worker.py: python worker.py TASK, with TF_CONFIG set. Prints what it came to."""

import json
import sys

import numpy as np
import tensorflow as tf

import bigbatch.tensorflow as bb

SIZES = [(3, 1), (2, 4), (1, 1), (5, 2)]


def data():
    rng = np.random.default_rng(0)
    return [[rng.normal(size=(n, 3)) for n in sizes] for sizes in SIZES]


def main(task):
    # The first thing that TensorFlow does: workers meet here.
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        w = tf.Variable(tf.constant([1.0, 2.0, 3.0], tf.float64))
        optimizer = tf.keras.optimizers.SGD(0.1, momentum=0.9)
        acc = bb.Accumulator(optimizer, every=4)

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float64)])
    def feed(x):
        def step(x):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.tanh(tf.linalg.matvec(x, w)) ** 2)
            return acc.apply_gradients([(tape.gradient(loss, w), w)], items=tf.shape(x)[0], loss=loss)

        return strategy.run(step, args=(x,))

    moved = []
    for parts in [*data(), *data(), *data()[:2]]:
        before = w.numpy()
        update = feed(tf.constant(parts[task]))
        moved.append(bool((w.numpy() != before).any()))
    tail = acc.flush()
    print(json.dumps({
        "replicas": strategy.num_replicas_in_sync, "w": w.numpy().tolist(), "moved": moved,
        "items": float(tail.items), "pending": int(update.micro_batches),
    }))  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
