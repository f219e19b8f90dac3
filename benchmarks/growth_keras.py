"""Keras's windows for `growth.py`, on the backend that KERAS_BACKEND names: the train functions that `fit` calls."""

import keras
import resident
from keras_jobs import Job, digits, mlp
from keras_ways import BACKEND, WAYS, Trial, on

PACKAGES = ["keras", {"tensorflow": "tensorflow-cpu"}.get(BACKEND, BACKEND)]
ON = on()


def windows(width, n, size=16):
    """One window of each way."""
    trial = Trial(Job("", lambda: mlp(width), digits, size, n), 1, keras.optimizers.SGD)
    bare, loop, _ = WAYS(trial)
    streamed = bare(trial.stream(), size, pulled=n)
    streamed.correction = lambda: -(trial.x.nbytes + trial.y.nbytes)  # pulled inside, and joined
    return {
        "by hand": loop(trial.model(), add=True),
        "ours, split": bare(trial.split(), n * size),
        "ours, stream": streamed,
    }


def peaks(points):
    """Bytes of each way at some (width, micro-batches)."""
    if BACKEND == "tensorflow":
        return resident.growth(__file__, points)
    found = []
    for point in points:
        runs = windows(*point)
        if BACKEND == "jax":
            found.append({name: run.bytes[1] for name, run in runs.items()})
        else:
            from torch_jobs import peak

            for run in runs.values():
                run()
            found.append({name: peak(run) for name, run in runs.items()})
    return found


if __name__ == "__main__":
    resident.answer(windows)
