"""One window on each Keras backend, through `fit` and bare: ours, Keras's own accumulation, and the loop by hand.

KERAS_BACKEND=tensorflow python benchmarks/keras_fit.py [--repetitions 15] [--write]

And with jax, and torch: each writes its own part of keras_fit.md.
16 micro-batches of 16, an MLP 784-1024-1024-10, Adam.
"""

import argparse
import itertools
import time
from pathlib import Path

import keras
import numpy as np
from interleaved import circumstances, measure, ratio, section, table

import bigbatch.keras as bb

BACKEND = keras.backend.backend()
PAGE = Path(__file__).with_suffix(".md")
N, MICRO = 16, 16
WINDOWS = 8
GOALS = {"tensorflow": 0.50, "jax": 0.36, "torch": 0.70}
PACKAGES = {"tensorflow": "tensorflow-cpu", "jax": "jax", "torch": "torch"}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(WINDOWS * N * MICRO, 784)).astype("float32")
Y = RNG.integers(0, 10, len(X))
HEAD = f"""# Keras: one window

{N} micro-batches of {MICRO}, an MLP 784-1024-1024-10 with Adam; {WINDOWS} windows at a time. Times are of one window:
medians and quartiles over the repetitions, each contender once a round in one process, in an order drawn anew; ratios
are medians over the rounds.

- *Keras* is `gradient_accumulation_steps={N}`.
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
Left over the floor: the sums. XLA writes each gradient and adds it in a pass of its own. The division is part of
the update's own pass, and the test for inf reads the sums once a window.""",
    "torch": """\
Left over the floor: autograd adds each gradient in a pass of its own, and a window has a pass to divide and one to
test for inf. Every contender pays for Keras's own Python in each layer and loss. `bigbatch.torch` spares the
adding with a `TorchFunctionMode`; Keras asks tensors for their shape, type and device so often that here the mode
cost as much as it spared.""",
}


def model(jit_compile="auto", **options):
    """The MLP, compiled and built, with the same weights each time; `options` are Adam's."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(1024, activation="relu") for _ in range(2)]
    made = keras.Sequential([keras.Input((784,)), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    made.compile(keras.optimizers.Adam(1e-3, **options), loss, jit_compile=jit_compile)
    made.train_on_batch(X[:MICRO], Y[:MICRO])  # builds the optimizer and the loss
    return made


class Clock(keras.callbacks.Callback):
    """The seconds of an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        keras.ops.convert_to_numpy(self.model.trainable_variables[-1])  # waits, where the device is still at it
        self.seconds = time.perf_counter() - self.started


def fit(trained, batch_size):
    """As a user calls it, on arrays."""
    clock = Clock()

    def run():
        trained.fit(X, Y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[clock])
        return clock.seconds

    return run


def batches(size):
    """The data as `fit` would hand it over."""
    return [(X[i : i + size], Y[i : i + size]) for i in range(0, len(X), size)]


def tensorflow():
    """Train functions called on a data set that is there already, and loops by hand."""
    import tensorflow as tf

    def bare(trained, size, pulled=1):
        trained.make_train_function()
        pairs = tf.data.Dataset.from_tensor_slices((X.reshape(-1, size, 784), Y.reshape(-1, size)))
        iterator = iter(pairs.repeat())

        def run():
            for _ in range(len(X) // size // pulled):
                logs = trained.train_function(iterator)
            float(logs["loss"])

        return run

    def loop(trained, add, at_once=10):
        variables = [v.value for v in trained.trainable_variables]

        def gradients(x, y):
            with tf.GradientTape() as tape:
                loss = trained.loss(y, trained(x, training=True))
            return loss, tape.gradient(loss, variables)

        @tf.function
        def step(x, y):
            def body(i, held):
                part = slice(i * MICRO, (i + 1) * MICRO)
                new = gradients(x[part], y[part])
                return i + 1, tf.nest.map_structure(tf.add, held, new) if add else new

            start = tf.constant(0.0), [tf.zeros(v.shape) for v in variables]
            _, (loss, sums) = tf.while_loop(lambda i, _: i < N, body, (0, start), parallel_iterations=at_once)
            trained.optimizer.apply([g / N for g in sums], trained.trainable_variables)
            return loss / N

        pairs = [(tf.constant(x), tf.constant(y)) for x, y in batches(N * MICRO)]

        def run():
            for x, y in pairs:
                float(step(x, y))

        return run

    more = {
        "by hand, one at a time": loop(model(), add=True, at_once=1),
        "floor, one at a time": loop(model(), add=False, at_once=1),
        "Keras, bare, XLA": bare(model(True, gradient_accumulation_steps=N), MICRO),
        "split, bare, XLA": bare(bb.accumulate(model(True), micro_batch=MICRO), N * MICRO),
        "stream, bare, XLA": bare(bb.accumulate(model(True), every=N), MICRO, pulled=N),
    }
    return bare, loop, more


def jax():
    """The compiled steps called on arrays, and scans by hand, with donated state."""
    import jax
    from jax import numpy as jnp

    def bare(trained, size, pulled=1):
        trained.make_train_function()
        parts = ["trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables"]
        state = trained._get_jax_state(**dict.fromkeys(parts, True), purge_model_variables=True)

        def run():
            nonlocal state
            iterator = iter(batches(size))
            for _ in range(len(X) // size // pulled):
                _, state = trained.train_function(state, iterator)
            jax.block_until_ready(state)

        x, y = batches(size * pulled)[0]
        given = (x, y) if pulled == 1 else [(x.reshape(pulled, size, -1), y.reshape(pulled, size))]
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
            parts = x.reshape(N, MICRO, 784), y.reshape(N, MICRO)
            (loss, sums), _ = jax.lax.scan(body, start, parts)
            trainable, optimizer = trained.optimizer.stateless_apply(optimizer, [g / N for g in sums], trainable)
            return loss / N, (trainable, non_trainable, optimizer)

        step = jax.jit(step, donate_argnums=0)
        variables = trained.trainable_variables, trained.non_trainable_variables, trained.optimizer.variables
        state = tuple([v.value for v in several] for several in variables)

        def run():
            nonlocal state
            for x, y in batches(N * MICRO):
                _, state = step(state, x, y)
            jax.block_until_ready(state)

        run.mebibytes = needs(step, state, *batches(N * MICRO)[0])
        return run

    return bare, loop, {}


def torch():
    """Train functions called on tensors, and the loop by hand."""
    import torch

    def bare(trained, size, pulled=1):
        trained.make_train_function()
        pairs = [tuple(map(torch.from_numpy, pair)) for pair in batches(size)]

        def run():
            iterator = iter(pairs)
            for _ in range(len(X) // size // pulled):
                trained.train_function(list(itertools.islice(iterator, pulled)))

        return run

    def loop(trained, add):
        variables = trained.trainable_variables
        parameters = [v.value for v in variables]

        def run():
            for x, y in pairs:
                for x_part, y_part in zip(x.split(MICRO), y.split(MICRO), strict=True):
                    loss = trained.loss(y_part, trained(x_part, training=True)) / N
                    if add:
                        loss.backward()
                    else:
                        gradients = torch.autograd.grad(loss, parameters)
                if add:
                    gradients = [p.grad for p in parameters]
                with torch.no_grad():
                    trained.optimizer.apply(gradients, variables)
                trained.zero_grad()

        pairs = [tuple(map(torch.from_numpy, pair)) for pair in batches(N * MICRO)]
        return run

    return bare, loop, {}


def main() -> None:
    """Measures and prints the backend's part of the page, and with --write writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--write", action="store_true", help="write this backend's part of benchmarks/keras_fit.md")
    options = parser.parse_args()
    bare, loop, more = {"tensorflow": tensorflow, "jax": jax, "torch": torch}[BACKEND]()

    def builtin():
        return model(gradient_accumulation_steps=N)

    contenders = {
        "Keras, `fit`": fit(builtin(), MICRO),
        "split, `fit`": fit(bb.accumulate(model(), micro_batch=MICRO), N * MICRO),
        "stream, `fit`": fit(bb.accumulate(model(), every=N), MICRO),
        "Keras, bare": bare(builtin(), MICRO),
        "split, bare": bare(bb.accumulate(model(), micro_batch=MICRO), N * MICRO),
        "stream, bare": bare(bb.accumulate(model(), every=N), MICRO, pulled=N),
        "by hand": loop(model(), add=True),
        "floor": loop(model(), add=False),
        "full batch, `fit`": fit(model(), N * MICRO),
        **more,
    }
    timings = measure(contenders, options.repetitions)
    for timing in timings.values():
        timing.seconds[:] = [seconds / WINDOWS for seconds in timing.seconds]
    ways = ["`fit`", "bare"] + ["bare, XLA"] * bool(more)
    goals = [(f"{door}, {way}", f"Keras, {way}") for door in ("split", "stream") for way in ways]
    wanted = "| | measured | wanted, at most |\n| --- | ---: | ---: |"
    for ours, theirs in goals:
        wanted += f"\n| {ours} / {theirs} | {ratio(timings, ours, theirs):.2f} | {GOALS[BACKEND]:.2f} |"
    live = {name: f"{run.mebibytes:.2f}" if hasattr(run, "mebibytes") else "" for name, run in contenders.items()}
    columns = {"live MiB": live} if any(live.values()) else {}
    part = (
        f"{table(timings, ['Keras, `fit`', 'Keras, bare', 'by hand', 'floor'], columns)}\n\n{wanted}\n\n"
        f"{NOTES[BACKEND]}\n\n"
        f"`KERAS_BACKEND={BACKEND} python benchmarks/keras_fit.py --repetitions {options.repetitions} --write`: "
        f"{circumstances('keras', PACKAGES[BACKEND])}"
    )
    print(part)
    if options.write:
        section(PAGE, HEAD, BACKEND, part)


if __name__ == "__main__":
    main()
