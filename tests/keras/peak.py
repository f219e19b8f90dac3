"""Prints what a step takes at its peak over what the model and the batch hold, in copies of the gradient.

KERAS_BACKEND=tensorflow python tests/keras/peak.py MICRO_BATCHES OF_HOW_MANY
"""

import os
import sys
from pathlib import Path

# Tensors mapped one by one, so that the process holds what they hold, and no holes of the heap's.
if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})

import keras
import tensorflow as tf

import bigbatch.keras as bb

sys.path.append(str(Path(__file__).parents[1]))  # appended: folders there have the frameworks' names
from process_memory import growth

LAYERS, WIDTH = 6, 2048


def ready(micro_batches, micro_batch, width):
    """A step that nobody has called, of a model that is there."""
    dense = [keras.layers.Dense(width, activation="tanh", use_bias=False) for _ in range(LAYERS)]
    model = keras.Sequential([keras.Input((width,)), *dense])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.optimizer.build(model.trainable_variables)
    bb.accumulate(model, micro_batch=micro_batch)
    x = tf.ones([micro_batches * micro_batch, width])
    return lambda: model.train_on_batch(x, x)


def main(micro_batches, micro_batch):
    ready(micro_batches, micro_batch, 64)()  # what TensorFlow keeps for itself is there
    step = ready(micro_batches, micro_batch, WIDTH)
    copies = growth(step) / (4 * LAYERS * WIDTH**2)  # of the first run: TensorFlow keeps what is freed
    print(f"{micro_batches} micro-batches of {micro_batch}: {copies:.2f} copies")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
