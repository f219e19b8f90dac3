"""TensorFlow's windows for `growth.py`: ours and by hand, in `tf.function`."""

import keras_jobs
import resident
import tensorflow as tf
import tensorflow_window

WAYS = {"by hand": "hand-written", "ours, stream": "ours, stream", "ours, split": "ours, split"}
PACKAGES = ["tensorflow-cpu"]
ON = tensorflow_window.ON


def windows(width, n, size=16):
    """One window of each way."""
    job = keras_jobs.Job("", lambda: keras_jobs.mlp(width), keras_jobs.digits, size, n)

    def made(way):
        contender = tensorflow_window.Contender(job, tf.keras.optimizers.SGD(1e-3))
        return tensorflow_window.whole(contender, tensorflow_window.WAYS[way](contender))

    return {name: made(way) for name, way in WAYS.items()}


def peaks(points):
    """Bytes of each way at some (width, micro-batches)."""
    return resident.growth(__file__, points)


if __name__ == "__main__":
    resident.answer(windows)
