"""One window on each Keras backend: bigbatch's two doors, Keras's own accumulation, and the full batch.

KERAS_BACKEND=tensorflow python benchmarks/keras_fit.py [--repetitions 15] [--write]

And with jax, and torch: each writes its own part of keras_fit.md.

16 micro-batches of 16, an MLP 784-1024-1024-10, Adam, through `fit` on arrays, as a user calls it.
"""

import argparse
import re
from pathlib import Path

import keras
import numpy as np
from interleaved import circumstances, measure, ratio, table

import bigbatch.keras as bb

BACKEND = keras.backend.backend()
PAGE = Path(__file__).parent / "keras_fit.md"
N, MICRO = 16, 16
WINDOWS = 4  # an epoch of several, so that what fit does once an epoch does not stand for a window
GOALS = {"tensorflow": 0.50, "jax": 0.36, "torch": 0.70}
PACKAGES = {"tensorflow": "tensorflow-cpu", "jax": "jax", "torch": "torch"}
HEAD = f"""# Keras: one window

`fit` on {WINDOWS} windows of {N} micro-batches of {MICRO}: an MLP 784-1024-1024-10 with Adam.
Times are of one window, medians of the repetitions in one process, in turn; ratios are medians over the rounds.
"""


def model(**options):
    """The MLP, compiled and built, with the same weights each time."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(1024, activation="relu") for _ in range(2)]
    made = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.Adam(1e-3, **options), loss)
    return made


def main() -> None:
    """Measures and prints the backend's part of the page, and with --write writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="write this backend's part of benchmarks/keras_fit.md")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(WINDOWS * N * MICRO, 784)).astype("float32")
    y = rng.integers(0, 10, len(x))

    def fit(trained, batch_size):
        return lambda: trained.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)

    contenders = {
        "Keras, gradient_accumulation_steps": fit(model(gradient_accumulation_steps=N), MICRO),
        "bigbatch, split": fit(bb.accumulate(model(), micro_batch=MICRO), N * MICRO),
        "bigbatch, stream": fit(bb.accumulate(model(), every=N), MICRO),
        "full batch": fit(model(), N * MICRO),
    }
    timings = measure(contenders, options.repetitions)
    for timing in timings.values():
        timing.seconds[:] = [seconds / WINDOWS for seconds in timing.seconds]
    builtin = "Keras, gradient_accumulation_steps"
    for door in ("split", "stream"):
        reached = ratio(timings, f"bigbatch, {door}", builtin)
        print(f"{BACKEND}, {door}: {reached:.2f} × the built-in; wanted: at most {GOALS[BACKEND]:.2f}")
    part = (
        f"## {BACKEND}\n\n{table(timings, [builtin, 'full batch'])}\n\n"
        f"`KERAS_BACKEND={BACKEND} python benchmarks/keras_fit.py --repetitions {options.repetitions} --write`: "
        f"{circumstances('keras', PACKAGES[BACKEND])}\n"
    )
    print(part)
    if not options.write:
        return
    page = PAGE.read_text() if PAGE.exists() else HEAD
    page = re.sub(rf"\n## {BACKEND}\n.*?(?=\n## |\Z)", "", page, flags=re.S)
    PAGE.write_text(f"{page.rstrip()}\n\n{part}")


if __name__ == "__main__":
    main()
