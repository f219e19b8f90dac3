"""Prints what a batch's gradient takes at its peak over what the model and the batch hold, in copies of the gradient.

python tests/tensorflow/peak.py MICRO_BATCHES OF_HOW_MANY
"""

import sys
from pathlib import Path

import tensorflow as tf

import bigbatch.tensorflow as bb

sys.path.append(str(Path(__file__).parents[1]))  # appended: folders there have the frameworks' names
from process_memory import growth

LAYERS, WIDTH = 12, 1024


def ready(micro_batches, micro_batch, width):
    """A step that nobody has called, of a model that is there."""
    layers = [tf.Variable(tf.fill([width, width], 1 / width)) for _ in range(LAYERS)]

    def loss_fn(h):
        for w in layers:
            h = tf.tanh(h @ w)
        return tf.reduce_mean(h)

    @tf.function
    def step(x):
        return bb.value_and_grad(loss_fn, x, layers, micro_batch=micro_batch)

    x = tf.ones([micro_batches * micro_batch, width])
    return lambda: step(x)


def main(micro_batches, micro_batch):
    ready(micro_batches, micro_batch, 64)()  # what TensorFlow keeps for itself is there
    step = ready(micro_batches, micro_batch, WIDTH)
    copies = growth(step) / (4 * LAYERS * WIDTH**2)  # of the first run: TensorFlow keeps what is freed
    print(f"{micro_batches} micro-batches of {micro_batch}: {copies:.2f} copies")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
