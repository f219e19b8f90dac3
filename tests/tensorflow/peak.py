"""Prints what a batch's gradient takes at its peak over what the model and the batch hold, in copies of the gradient.

python tests/tensorflow/peak.py
"""

import gc
import os
import sys
from pathlib import Path

import tensorflow as tf

import bigbatch.tensorflow as bb

LAYERS, WIDTH = 12, 1024


def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak(micro_batches, micro_batch):
    layers = [tf.Variable(tf.random.normal([WIDTH, WIDTH]) / WIDTH**0.5) for _ in range(LAYERS)]

    def loss_fn(h):
        for w in layers:
            h = tf.tanh(h @ w)
        return tf.reduce_mean(h)

    @tf.function
    def step(x):
        return bb.value_and_grad(loss_fn, x, layers, micro_batch=micro_batch)

    x = tf.random.normal([micro_batches * micro_batch, WIDTH])
    step(x)  # traced, and what TensorFlow keeps for itself is there
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = memory("VmRSS")
    step(x)
    return (memory("VmHWM") - before) / (4 * LAYERS * WIDTH**2)


if __name__ == "__main__":
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # Every tensor that counts is mapped alone, and unmapped when it is freed, so that memory is what is in use.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    for micro_batches, micro_batch in ((1, 4), (8, 4), (90, 4), (160, 4), (2, 128), (16, 128)):
        print(f"{micro_batches} × {micro_batch}: {peak(micro_batches, micro_batch):.2f} copies", flush=True)
