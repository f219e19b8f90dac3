"""One window on each Keras backend, through `fit` and bare: ours, Keras's own accumulation, and the loop by hand.

KERAS_BACKEND=tensorflow python benchmarks/keras_fit.py [mlp-16 transformer …] [--repetitions 15] [--write]

And with jax, and torch: each writes its own part of keras_fit.md for each job.
"""

import argparse
import itertools
import time
from pathlib import Path

import keras
from interleaved import circumstances, measure, ratio, rounds, section, table
from keras_jobs import JOBS, loss

import bigbatch.keras as bb

BACKEND = keras.backend.backend()
PAGE = Path(__file__).with_suffix(".md")
GOALS = {"tensorflow": 0.50, "jax": 0.36, "torch": 0.70}  # of the MLP at micro-batch 16
PACKAGES = {"tensorflow": "tensorflow-cpu", "jax": "jax", "torch": "torch"}
HEAD = """# Keras: one window

16 micro-batches and one update by Adam, float32. Times are of one window: medians and quartiles over the repetitions,
each contender once a round in one process, in an order drawn anew; ratios are medians over the rounds.

- *Keras* is `gradient_accumulation_steps=16`.
- *`fit`* is an epoch inside `fit`, on arrays, as a user has it. What `fit` does once a training is left out, for all.
- *bare* is the train function that `fit` calls, on batches that are there already.
- *by hand* is what an expert writes with the same model and optimizer: a `tf.while_loop`, a `lax.scan` or a Python loop
  over the micro-batches, then one update. It keeps no metrics, weighs no micro-batch, and takes inf as it comes.
- *floor* is the same with nothing added up: each gradient replaces the one before.
- *live MiB*, on JAX, is what XLA plans for the compiled step: arguments + outputs − aliased + temporary.
"""


NOTES = {
    "tensorflow": """\
The large weights' gradients are multiplied out once a window, where by hand and at the floor each micro-batch
multiplies its own. Left over that: a test for inf once a window, the metrics, and in the stream the micro-batches'
way from the data set one by one. The loop runs one micro-batch at a time, so that one's activations are in memory.
TensorFlow's default, ten at once, is quicker where a thread would be idle, and holds the activations of those that
have begun.
Keras leaves XLA off where there is no accelerator; *XLA* is `compile(jit_compile=True)`, for ours and for Keras's
own alike.""",
    "jax": """\
The large weights' gradients are multiplied out once a window where their factors are small, while by hand and at the
floor each micro-batch multiplies its own. Of the others XLA writes each gradient and adds it in a pass of its own. The
division is part of the update's own pass, and the test for inf reads the sums once a window.""",
    "torch": """\
Left over the floor: autograd adds each gradient in a pass of its own, and a window has a pass to divide and one to
test for inf. Every contender pays for Keras's own Python in each layer and loss. `bigbatch.torch` spares the
adding with a `TorchFunctionMode`; Keras asks tensors for their shape, type and device so often that here the mode
cost as much as it spared.""",
}


class Trial:
    """A job's data, some windows of it, and its model as often as it is wanted."""

    def __init__(self, job, windows):
        self.job, self.windows = job, windows
        self.size, self.n = job.size, job.micro_batches
        self.x, self.y = job.batch(windows)

    def model(self, jit_compile="auto", **options):
        """Compiled and built, with the same weights each time; `options` are Adam's."""
        made = self.job.make()
        made.compile(keras.optimizers.Adam(1e-3, **options), loss(), jit_compile=jit_compile)
        made.train_on_batch(self.x[: self.size], self.y[: self.size])  # builds the optimizer and the loss
        return made

    def split(self, *jit_compile):
        return bb.accumulate(self.model(*jit_compile), micro_batch=self.size)

    def stream(self, *jit_compile):
        return bb.accumulate(self.model(*jit_compile), every=self.n)

    def builtin(self, *jit_compile):
        return self.model(*jit_compile, gradient_accumulation_steps=self.n)

    def batches(self, size):
        """The data as `fit` would hand it over."""
        return [(self.x[i : i + size], self.y[i : i + size]) for i in range(0, len(self.x), size)]

    def fit(self, trained, batch_size):
        """As a user calls it, on arrays."""
        clock = Clock()

        def run():
            trained.fit(self.x, self.y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[clock])
            return clock.seconds

        return run


class Clock(keras.callbacks.Callback):
    """The seconds of an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        keras.ops.convert_to_numpy(self.model.trainable_variables[-1])  # waits, where the device is still at it
        self.seconds = time.perf_counter() - self.started


def tensorflow(trial):
    """Train functions called on a data set that is there already, and loops by hand."""
    import tensorflow as tf

    def bare(trained, size, pulled=1):
        trained.make_train_function()
        pairs = tf.data.Dataset.from_tensor_slices((trial.x, trial.y)).batch(size)
        iterator = iter(pairs.repeat())

        def run():
            for _ in range(len(trial.x) // size // pulled):
                logs = trained.train_function(iterator)
            float(logs["loss"])

        return run

    def loop(trained, add, at_once=10):
        variables = [v.value for v in trained.trainable_variables]

        def gradients(x, y):
            with tf.GradientTape() as tape:
                loss = trained.loss(y, trained(x, training=True))
            found = tape.gradient(loss, variables)
            # An embedding's, once dense, has lost its static shape.
            return loss, [
                tf.ensure_shape(tf.convert_to_tensor(g), v.shape) for g, v in zip(found, variables, strict=True)
            ]

        @tf.function
        def step(x, y):
            def body(i, held):
                part = slice(i * trial.size, (i + 1) * trial.size)
                new = gradients(x[part], y[part])
                return i + 1, tf.nest.map_structure(tf.add, held, new) if add else new

            start = tf.constant(0.0), [tf.zeros(v.shape) for v in variables]
            _, (loss, sums) = tf.while_loop(lambda i, _: i < trial.n, body, (0, start), parallel_iterations=at_once)
            trained.optimizer.apply([g / trial.n for g in sums], trained.trainable_variables)
            return loss / trial.n

        pairs = [(tf.constant(x), tf.constant(y)) for x, y in trial.batches(trial.n * trial.size)]

        def run():
            for x, y in pairs:
                float(step(x, y))

        return run

    more = {
        "by hand, one at a time": loop(trial.model(), add=True, at_once=1),
        "floor, one at a time": loop(trial.model(), add=False, at_once=1),
        "Keras, bare, XLA": bare(trial.builtin(True), trial.size),
        "split, bare, XLA": bare(trial.split(True), trial.n * trial.size),
        "stream, bare, XLA": bare(trial.stream(True), trial.size, pulled=trial.n),
    }
    return bare, loop, more


def jax(trial):
    """The compiled steps called on arrays, and scans by hand, with donated state."""
    import jax
    from jax import numpy as jnp

    def bare(trained, size, pulled=1):
        trained.make_train_function()
        parts = ["trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables"]
        state = trained._get_jax_state(**dict.fromkeys(parts, True), purge_model_variables=True)

        def run():
            nonlocal state
            iterator = iter(trial.batches(size))
            for _ in range(len(trial.x) // size // pulled):
                _, state = trained.train_function(state, iterator)
            jax.block_until_ready(state)

        x, y = trial.batches(size * pulled)[0]
        given = (x, y) if pulled == 1 else [tuple(a.reshape(pulled, size, *a.shape[1:]) for a in (x, y))]
        run.mebibytes = needs(jax.jit(trained.train_step, donate_argnums=0), state, given)
        return run

    def needs(step, state, *args):
        memory = step.lower(state, *args).compile().memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return (size - memory.alias_size_in_bytes + memory.temp_size_in_bytes) / 2**20

    def loop(trained, add):
        def loss_fn(trainable, non_trainable, x, y):
            y_pred, _ = trained.stateless_call(trainable, non_trainable, x, training=True)
            return trained.loss(y, y_pred)

        def step(state, x, y):
            trainable, non_trainable, optimizer = state

            def body(held, part):
                new = jax.value_and_grad(loss_fn)(trainable, non_trainable, *part)
                return jax.tree.map(jnp.add, held, new) if add else new, None

            start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable)
            parts = [a.reshape(trial.n, trial.size, *a.shape[1:]) for a in (x, y)]
            (loss, sums), _ = jax.lax.scan(body, start, parts)
            trainable, optimizer = trained.optimizer.stateless_apply(optimizer, [g / trial.n for g in sums], trainable)
            return loss / trial.n, (trainable, non_trainable, optimizer)

        step = jax.jit(step, donate_argnums=0)
        variables = trained.trainable_variables, trained.non_trainable_variables, trained.optimizer.variables
        state = tuple([v.value for v in several] for several in variables)

        def run():
            nonlocal state
            for x, y in trial.batches(trial.n * trial.size):
                _, state = step(state, x, y)
            jax.block_until_ready(state)

        run.mebibytes = needs(step, state, *trial.batches(trial.n * trial.size)[0])
        return run

    return bare, loop, {}


def torch(trial):
    """Train functions called on tensors, and the loop by hand."""
    import torch

    def bare(trained, size, pulled=1):
        trained.make_train_function()
        pairs = [tuple(map(torch.from_numpy, pair)) for pair in trial.batches(size)]

        def run():
            iterator = iter(pairs)
            for _ in range(len(trial.x) // size // pulled):
                trained.train_function(list(itertools.islice(iterator, pulled)))

        return run

    def loop(trained, add):
        variables = trained.trainable_variables
        parameters = [v.value for v in variables]

        def run():
            for x, y in pairs:
                for x_part, y_part in zip(x.split(trial.size), y.split(trial.size), strict=True):
                    loss = trained.loss(y_part, trained(x_part, training=True)) / trial.n
                    if add:
                        loss.backward()
                    else:
                        gradients = torch.autograd.grad(loss, parameters)
                if add:
                    gradients = [p.grad for p in parameters]
                with torch.no_grad():
                    trained.optimizer.apply(gradients, variables)
                trained.zero_grad()

        pairs = [tuple(map(torch.from_numpy, pair)) for pair in trial.batches(trial.n * trial.size)]
        return run

    return bare, loop, {}


def contenders(trial) -> dict:
    """Everybody on one job."""
    bare, loop, more = {"tensorflow": tensorflow, "jax": jax, "torch": torch}[BACKEND](trial)
    batch = trial.n * trial.size
    return {
        "Keras, `fit`": trial.fit(trial.builtin(), trial.size),
        "split, `fit`": trial.fit(trial.split(), batch),
        "stream, `fit`": trial.fit(trial.stream(), trial.size),
        "Keras, bare": bare(trial.builtin(), trial.size),
        "split, bare": bare(trial.split(), batch),
        "stream, bare": bare(trial.stream(), trial.size, pulled=trial.n),
        "by hand": loop(trial.model(), add=True),
        "floor": loop(trial.model(), add=False),
        "full batch, `fit`": trial.fit(trial.model(), batch),
        **more,
    }


def main() -> None:
    """Measures and prints the backend's part of the page, and with --write writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"some of {list(JOBS)}; mlp-16, transformer and convolutional without")
    parser.add_argument("--repetitions", type=int, default=0, help="rounds; without, what takes about a minute")
    parser.add_argument("--write", action="store_true", help="write this backend's part of benchmarks/keras_fit.md")
    options = parser.parse_args()
    for name in options.jobs or ["mlp-16", "transformer", "convolutional"]:
        trial = Trial(JOBS[name], 8 if name == "mlp-16" else 2)
        runs = contenders(trial)
        repetitions = options.repetitions or rounds(runs, 60)
        timings = measure(runs, repetitions)
        for timing in timings.values():
            timing.seconds[:] = [seconds / trial.windows for seconds in timing.seconds]
        ways = ["`fit`", "bare"] + ["bare, XLA"] * ("split, bare, XLA" in runs)
        goal = f"{GOALS[BACKEND]:.2f}" if name == "mlp-16" else ""
        wanted = "| | measured | wanted, at most |\n| --- | ---: | ---: |"
        for way in ways:
            for door in ("split", "stream"):
                wanted += f"\n| {door}, {way} / Keras, {way} | "
                wanted += f"{ratio(timings, f'{door}, {way}', f'Keras, {way}'):.2f} | {goal} |"
        wanted += f"\n| split, bare / floor | {ratio(timings, 'split, bare', 'floor'):.2f} | |"
        live = {name: f"{run.mebibytes:.2f}" if hasattr(run, "mebibytes") else "" for name, run in runs.items()}
        columns = {"live MiB": live} if any(live.values()) else {}
        part = (
            f"{trial.job.title}; {trial.windows} windows at a time, {repetitions} rounds.\n\n"
            f"{table(timings, ['Keras, `fit`', 'Keras, bare', 'by hand', 'floor'], columns)}\n\n{wanted}\n\n"
            f"{NOTES[BACKEND] if name == 'mlp-16' else ''}\n\n"
            f"`KERAS_BACKEND={BACKEND} python benchmarks/keras_fit.py {name} --repetitions {repetitions} --write`: "
            f"{circumstances('keras', PACKAGES[BACKEND])}"
        )
        print(part, flush=True)
        if options.write:
            section(PAGE, HEAD, f"{BACKEND}, {name}", part)


if __name__ == "__main__":
    main()
