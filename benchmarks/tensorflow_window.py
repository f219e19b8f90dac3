"""TensorFlow: one window of an MLP, ours against the loop an expert writes, with and without XLA, and the floor.

    python benchmarks/tensorflow_window.py [--repetitions 100]

The floor is N forwards and backwards in one graph call each, every gradient thrown away, and one update.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
from interleaved import circumstances, measure, ratio, table

import bigbatch.tensorflow as bb

N, SIZE = 16, 16
cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Contender:
    """A model and its optimizer; `window` makes one update and waits for it."""

    def __init__(self, x, y, jit):
        tf.keras.utils.set_random_seed(0)
        widths = [(1024, "relu"), (1024, "relu"), (10, None)]
        self.model = tf.keras.Sequential([tf.keras.layers.Input((784,)), *(tf.keras.layers.Dense(*w) for w in widths)])
        self.variables = self.model.trainable_variables
        self.optimizer = tf.keras.optimizers.Adam()
        self.optimizer.build(self.variables)
        self.x, self.y = x, y
        self.parts = list(zip(tf.split(x, N), tf.split(y, N), strict=True))
        self.jit = {"jit_compile": jit}

    def loss_fn(self, batch):
        x, y = batch
        return cross_entropy(y, self.model(x, training=True))

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            loss = self.loss_fn((x, y))
        return loss, tape.gradient(loss, self.variables)

    def apply(self, gradients):
        self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))


def split(c):
    @tf.function(**c.jit)
    def step(x, y):
        loss, gradients = bb.value_and_grad(c.loss_fn, (x, y), c.variables, micro_batch=SIZE)
        c.apply(gradients)
        return loss

    return lambda: float(step(c.x, c.y))


def stream(c):
    acc = bb.Accumulator(c.optimizer, every=N)

    @tf.function(**c.jit)
    def step(x, y):
        loss, gradients = c.gradients(x, y)
        return acc.apply_gradients(zip(gradients, c.variables, strict=True), items=SIZE, loss=loss)

    return lambda: float([step(*part) for part in c.parts][-1].loss)


def hand_written(c):
    sums = [tf.Variable(tf.zeros_like(v)) for v in c.variables]

    @tf.function(**c.jit)
    def accumulate(x, y):
        loss, gradients = c.gradients(x, y)
        for s, g in zip(sums, gradients, strict=True):
            s.assign_add(g)
        return loss

    @tf.function(**c.jit)
    def update():
        c.apply([s / N for s in sums])
        for s in sums:
            s.assign(tf.zeros_like(s))

    def window():
        losses = [accumulate(*part) for part in c.parts]
        update()
        return float(tf.add_n(losses)) / N

    return window


def hand_written_eager(c):
    sums = [tf.Variable(tf.zeros_like(v)) for v in c.variables]

    def window():
        for part in c.parts:
            loss, gradients = c.gradients(*part)
            for s, g in zip(sums, gradients, strict=True):
                s.assign_add(g)
        c.apply([s / N for s in sums])
        for s in sums:
            s.assign(tf.zeros_like(s))
        return float(loss)

    return window


def floor(c):
    @tf.function(**c.jit)
    def gradients(x, y):
        return c.gradients(x, y)

    update = tf.function(c.apply, **c.jit)

    def window():
        for part in c.parts:
            loss, kept = gradients(*part)
        update(kept)
        return float(loss)

    return window


def full_batch(c):
    @tf.function(**c.jit)
    def step(x, y):
        loss, gradients = c.gradients(x, y)
        c.apply(gradients)
        return loss

    return lambda: float(step(c.x, c.y))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="write benchmarks/tensorflow_window.md")
    options = parser.parse_args()
    repetitions = options.repetitions
    x = tf.random.stateless_normal([N * SIZE, 784], [0, 0])
    y = tf.random.stateless_uniform([N * SIZE], [0, 1], maxval=10, dtype=tf.int32)
    contenders = {
        "split": split(Contender(x, y, False)),
        "stream": stream(Contender(x, y, False)),
        "hand-written": hand_written(Contender(x, y, False)),
        "hand-written, eager": hand_written_eager(Contender(x, y, False)),
        "floor": floor(Contender(x, y, False)),
        "the full batch at once": full_batch(Contender(x, y, False)),
        "split, XLA": split(Contender(x, y, True)),
        "stream, XLA": stream(Contender(x, y, True)),
        "hand-written, XLA": hand_written(Contender(x, y, True)),
    }
    timings = measure(contenders, repetitions)
    done_when = [
        ("split", "hand-written", 0.55),
        ("split", "hand-written, eager", 0.55),
        ("split, XLA", "hand-written", 0.55),
        ("split, XLA", "hand-written, XLA", 0.55),
    ]
    page = [
        "# TensorFlow: one window, ours and theirs",
        "",
        f"{N} micro-batches of {SIZE}, MLP 784-1024-1024-10, Adam, one window. {repetitions} rounds in one process, "
        "each contender once a round in an order drawn anew; medians, quartiles, and the medians of each round's "
        "ratios.",
        "",
        "    " + "python benchmarks/tensorflow_window.py" + f" --repetitions {repetitions}",
        "",
        circumstances("tensorflow-cpu", "keras"),
        "",
        table(timings, ["hand-written", "floor"]),
        "",
        "*hand-written* keeps accumulators and calls one `tf.function` a micro-batch, and one to apply; *eager* is the "
        "same with no `tf.function`; *floor* is the same calls with every gradient thrown away. "
        "The split door is under it where it multiplies a window's weight gradients out at once.",
        "",
        "| wanted | measured |",
        "| --- | --- |",
        *(f"| {a} ≤ {most} × {b} | {ratio(timings, a, b):.2f} |" for a, b, most in done_when),
        "",
    ]
    print("\n".join(page))
    if options.write:
        Path(__file__).with_suffix(".md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
