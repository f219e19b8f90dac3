"""TensorFlow: one window of each job, ours against the loop an expert writes, Keras's own way, XLA, and the floor.

    python benchmarks/tensorflow_window.py [mlp-16 transformer …] [--repetitions 25] [--write]
    python benchmarks/tensorflow_window.py mlp-16 --peaks         the memory alone, as asked for in a process of its own

The floor is N forwards and backwards in one graph call each, every gradient thrown away, and one update.
"""

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import resident
import tensorflow as tf
from interleaved import OVER_THE_FLOOR, circumstances, compared, figure, measure, page, rounds, section, table
from keras_jobs import JOBS
from keras_jobs import loss as cross_entropy

import bigbatch.tensorflow as bb


class Contender:
    """A model and its optimizer."""

    def __init__(self, job, optimizer, jit=False):
        self.job, self.model, self.loss = job, job.make(), cross_entropy()
        self.variables = self.model.trainable_variables
        self.optimizer = optimizer
        self.sums = []  # what a way keeps between windows
        self.optimizer.build(self.variables)
        self.x, self.y = map(tf.constant, job.batch())
        n = job.micro_batches
        self.parts = list(zip(tf.split(self.x, n), tf.split(self.y, n), strict=True))
        self.jit = {"jit_compile": jit}

    def loss_fn(self, batch):
        x, y = batch
        return self.loss(y, self.model(x, training=True))

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            loss = self.loss_fn((x, y))
        return loss, tape.gradient(loss, self.variables)

    def apply(self, gradients):
        self.optimizer.apply_gradients(zip(gradients, self.variables, strict=True))


def split(c):
    @tf.function(**c.jit)
    def step(x, y):
        loss, gradients = bb.value_and_grad(c.loss_fn, (x, y), c.variables, micro_batch=c.job.size)
        c.apply(gradients)
        return loss

    return lambda: step(c.x, c.y)


def stream(c):
    acc = bb.Accumulator(c.optimizer, every=c.job.micro_batches)

    @tf.function(**c.jit)
    def step(x, y):
        loss, gradients = c.gradients(x, y)
        return acc.apply_gradients(zip(gradients, c.variables, strict=True), items=c.job.size, loss=loss)

    acc.build(c.variables)
    others = {id(v) for v in [*c.variables, *(v.value for v in c.optimizer.variables)]}
    c.sums = [v for v in acc.variables if id(v) not in others]

    return lambda: [step(*part) for part in c.parts][-1].loss


def every_part(c):
    """The optimizer takes every micro-batch's gradients, and accumulates them itself."""
    c.sums = [v.value for v in c.optimizer.variables if "gradient_accumulator" in v.path]

    @tf.function(**c.jit)
    def step(x, y):
        loss, gradients = c.gradients(x, y)
        c.apply(gradients)
        return loss

    return lambda: [step(*part) for part in c.parts][-1]


def apply_mean(c, sums):
    c.apply([s / c.job.micro_batches for s in sums])
    for s in sums:
        s.assign(tf.zeros_like(s))


def hand_written(c):
    sums = c.sums = [tf.Variable(tf.zeros_like(v)) for v in c.variables]

    @tf.function(**c.jit)
    def accumulate(x, y):
        loss, gradients = c.gradients(x, y)
        for s, g in zip(sums, gradients, strict=True):
            s.assign_add(g)
        return loss

    @tf.function(**c.jit)
    def update():
        apply_mean(c, sums)

    def window():
        losses = [accumulate(*part) for part in c.parts]
        update()
        return tf.add_n(losses) / c.job.micro_batches

    return window


def hand_written_in_one(c):
    sums = c.sums = [tf.Variable(tf.zeros_like(v)) for v in c.variables]
    held = tf.Variable(0)

    def update():
        apply_mean(c, sums)
        held.assign(0)

    @tf.function(**c.jit)
    def step(x, y):
        loss, gradients = c.gradients(x, y)
        for s, g in zip(sums, gradients, strict=True):
            s.assign_add(g)
        held.assign_add(1)
        tf.cond(tf.equal(held, c.job.micro_batches), update, lambda: None)
        return loss

    return lambda: tf.add_n([step(*part) for part in c.parts]) / c.job.micro_batches


def hand_written_eager(c):
    sums = c.sums = [tf.Variable(tf.zeros_like(v)) for v in c.variables]

    def window():
        for part in c.parts:
            loss, gradients = c.gradients(*part)
            for s, g in zip(sums, gradients, strict=True):
                s.assign_add(g)
        apply_mean(c, sums)
        return loss

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
        return loss

    return window


def full_batch(c):
    @tf.function(**c.jit)
    def step(x, y):
        loss, gradients = c.gradients(x, y)
        c.apply(gradients)
        return loss

    return lambda: step(c.x, c.y)


WAYS = {
    "ours, split": split,
    "ours, stream": stream,
    "hand-written": hand_written,
    "hand-written, one function": hand_written_in_one,
    "hand-written, eager": hand_written_eager,
    "Keras": every_part,
    "floor": floor,
    "the full batch at once": full_batch,
}
WITH_XLA = ["ours, split", "ours, stream", "hand-written", "hand-written, one function", "Keras", "floor"]


def contenders(job, xla=True):
    def made(name, jit):
        steps = job.micro_batches if name == "Keras" else None
        contender = Contender(job, tf.keras.optimizers.Adam(gradient_accumulation_steps=steps), jit)
        return whole(contender, WAYS[name](contender))

    with_xla = {f"{name}, XLA": made(name, True) for name in WITH_XLA if xla}
    return {name: made(name, False) for name in WAYS} | with_xla


def whole(contender, window):
    """A window that waits until the device has done it, and says what it keeps until the next."""

    def run():
        float(window())  # of the loss
        if ON_GPU:
            tf.test.experimental.sync_devices()

    run.correction = lambda: sum(v.dtype.size * int(tf.size(v)) for v in contender.sums)
    return run


def pairs(name):
    """Ratios, and what is wanted at most."""
    for xla in ("", ", XLA"):
        yield f"ours, split{xla}", f"hand-written{xla}", None
        yield f"ours, split{xla}", f"floor{xla}", OVER_THE_FLOOR.get(name)
        yield f"ours, split{xla}", f"Keras{xla}", None
        yield f"ours, stream{xla}", f"hand-written{xla}", 1.0
        yield f"ours, stream{xla}", f"hand-written, one function{xla}", 1.0
        yield f"ours, stream{xla}", f"Keras{xla}", None
    yield "ours, split", "hand-written, eager", None


ON_GPU = bool(tf.config.list_physical_devices("GPU"))
HEAD = f"""# TensorFlow{" on a GPU" * ON_GPU}: one window, ours and theirs

Every contender once a round in one process, in an order drawn anew; medians, quartiles, and the medians of each round's
ratios.

*Hand-written* keeps accumulators and calls one `tf.function` a micro-batch, and one to apply when the host has counted
so many; *one function* counts by itself and applies in a `tf.cond`, as our stream door does; *eager* is the first with
no `tf.function`; *floor* is its calls with every gradient thrown away. *Keras* is the same loop with
`Adam(gradient_accumulation_steps=16)`. *XLA* is `jit_compile=True`. The split door is one call, and multiplies the
weight gradients of many micro-batches out at once, so it can be under that floor.

*Peak* is the most that a window holds beyond the parameters, the optimizer's state and the data. TensorFlow keeps no
account on a CPU, so it is what a process of its own holds more (`benchmarks/resident.py`), to half a MiB.
"""
ON = "a GPU, each window ending in a synchronization" if ON_GPU else "a CPU"
PAGE = page(__file__, ON_GPU)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of {list(JOBS)}; all of them without")
    parser.add_argument("--repetitions", type=int, default=0, help="rounds; without, what takes about 15 seconds")
    parser.add_argument("--peaks", action="store_true", help="only measure what each contender holds in a window")
    parser.add_argument("--write", action="store_true", help="write the jobs' parts of benchmarks/tensorflow_window.md")
    options = parser.parse_args()
    for name in options.jobs or JOBS:
        job = JOBS[name]
        if options.peaks:
            resident.told(contenders(job, xla=False))
            continue
        runs = contenders(job)
        repetitions = options.repetitions or rounds(runs, 15)
        timings = measure(runs, repetitions)
        sizes = resident.asked_of(__file__, name)
        peaks = {way: f"{sizes[way] / 2**20:.1f}" if way in sizes else "" for way in runs}
        shown = table(timings, ["hand-written", "Keras", "floor"], {"peak MiB": peaks})
        shown += f"\n\n{compared(timings, pairs(name))}"
        print(f"{job.title}, {job.micro_batches} micro-batches, {repetitions} rounds\n{shown}", flush=True)
        if options.write:
            figure(timings, f"{job.title}, {job.micro_batches} of them", PAGE.with_name(f"{PAGE.stem}-{name}.png"))
            body = (
                f"{job.micro_batches} micro-batches a window, Adam, float32, on {ON}; {repetitions} rounds.\n\n"
                f"{shown}\n\n![times]({PAGE.stem}-{name}.png)\n\n{circumstances('tensorflow-cpu', 'keras')}.\n\n"
                f"    python benchmarks/tensorflow_window.py {name} --repetitions {repetitions} --write\n"
            )
            section(PAGE, HEAD, job.title, body)


if __name__ == "__main__":
    main()
