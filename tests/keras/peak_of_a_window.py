"""Prints what a window was predicted to need, and what the process then grew by.

python peak_of_a_window.py mlp|convnet MICRO_BATCH MICRO_BATCHES          with KERAS_BACKEND=tensorflow, jax or torch
"""

import importlib
import sys
from pathlib import Path

import keras
import numpy as np

import bigbatch.keras as bb

sys.path.append(str(Path(__file__).parents[1]))  # appended: folders there have the frameworks' names
from process_memory import growth

planning = importlib.import_module("bigbatch.keras.plan")  # the package has its function under this name

layers = keras.layers


def job(name, length):
    """A model and a batch."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    if name == "mlp":
        shape, body = (784,), [layers.Dense(1024, activation="gelu"), layers.Dense(1024, activation="gelu")]
    else:
        convolutions = layers.Conv2D(16, 3, padding="same", activation="gelu"), layers.Conv2D(16, 1, activation="gelu")
        shape, body = (32, 32, 3), [*convolutions, layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input(shape), *body, layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, (rng.random((length, *shape), "float32"), rng.integers(0, 10, length, "int32"))


def main(name, micro_batch, micro_batches):
    model, (x, y) = job(name, micro_batch * micro_batches)
    predictions = planning.planner().Predictions(model, (x, y))
    needs = predictions.needs(micro_batch)
    if keras.backend.backend() == "jax":
        import jax

        # Compiled already, as what the compiler takes is none of the window's.
        program = predictions.programs.sums.lower(micro_batch, predictions.state, predictions.data).compile()
        run = lambda: jax.block_until_ready(program(predictions.state, predictions.data))  # noqa: E731
    else:
        # One small window, so that what the framework makes at its first operations is there.
        bb.accumulate(model, micro_batch=1).train_on_batch(x[:2], y[:2])
        bb.accumulate(model, micro_batch=micro_batch)
        x, y = predictions.data[:2] if keras.backend.backend() == "tensorflow" else (x, y)
        run = lambda: model.train_on_batch(x, y)  # noqa: E731
    print(needs, growth(run))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
