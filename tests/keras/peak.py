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

LAYERS, WIDTH = 12, 1024


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def main(micro_batches, micro_batch):
    dense = [keras.layers.Dense(WIDTH, activation="tanh", use_bias=False) for _ in range(LAYERS)]
    model = keras.Sequential([keras.Input((WIDTH,)), *dense])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    bb.accumulate(model, micro_batch=micro_batch)
    x = tf.ones([micro_batches * micro_batch, WIDTH])
    model.train_on_batch(x, x)  # traced
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    model.train_on_batch(x, x)
    copies = (memory("VmHWM") - before) / (4 * LAYERS * WIDTH**2)
    print(f"{micro_batches} micro-batches of {micro_batch}: {copies:.2f} copies")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
