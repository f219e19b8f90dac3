"""TensorFlow 1's windows for `growth.py`: runs of a session, ours and the three ops that people paste."""

import resident
from tf1_jobs import Job, digits, mlp, sgd

import tf1

PACKAGES = ["tensorflow-cpu"]
ON = tf1.ON


def windows(width, n, size=16):
    """One window of each way."""
    made = tf1.contenders(Job("", mlp(width, width), digits, size, n, sgd), ["three ops", "ours"])
    return {"by hand": made["three ops"], "ours, stream": made["ours"]}


def peaks(points):
    """Bytes of each way at some (width, micro-batches)."""
    return resident.growth(__file__, points)


if __name__ == "__main__":
    resident.answer(windows)
