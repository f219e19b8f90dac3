"""What Keras's benchmarks run on each backend: `fit`, the train functions that it calls, and loops by hand."""

import itertools
import math
import time

import keras
from keras_jobs import loss

import bigbatch.keras as bb

BACKEND = keras.backend.backend()


class Trial:
    """A job's data, some windows of it, and its model as often as it is wanted."""

    def __init__(self, job, windows, optimizer=lambda **options: keras.optimizers.Adam(1e-3, **options)):
        self.job, self.windows, self.optimizer = job, windows, optimizer
        self.size, self.n = job.size, job.micro_batches
        self.x, self.y = job.batch(windows)

    def model(self, jit_compile="auto", **options):
        """Compiled and built, with the same weights each time; `options` are the optimizer's."""
        made = self.job.make()
        made.compile(self.optimizer(**options), loss(), jit_compile=jit_compile)
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
        wait(self.model)
        self.seconds = time.perf_counter() - self.started


def on():
    """What it runs on, for the page."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return "a GPU" if tf.config.list_physical_devices("GPU") else "a CPU"
    if BACKEND == "jax":
        import jax

        return f"a {jax.default_backend().upper()}"
    from torch_jobs import ON_GPU

    return f"a {'GPU' if ON_GPU else 'CPU'}"


def accumulators(model):
    """The bytes of Keras's own sums, which stand between windows; float32, as the model is."""
    sums = [v for v in model.optimizer.variables if "gradient_accumulator" in v.path]
    return 4 * sum(math.prod(v.shape) for v in sums)


def wait(model):
    """Until the device has made the last update."""
    keras.ops.convert_to_numpy(model.trainable_variables[-1])


def tensorflow(trial):
    """Train functions called on a data set that is there already, and loops by hand."""
    import tensorflow as tf

    def bare(trained, size, pulled=None):
        trained.make_train_function()
        if size == len(trial.x):
            pairs = tf.data.Dataset.from_tensors((trial.x, trial.y))  # no copy
        else:
            pairs = tf.data.Dataset.from_tensor_slices((trial.x, trial.y)).batch(size)
        iterator = iter(pairs.repeat())

        def run():
            for _ in range(len(trial.x) // size // (pulled or 1)):
                trained.train_function(iterator)
            wait(trained)

        run.correction = lambda: accumulators(trained)
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
                step(x, y)
            wait(trained)

        return run

    def more():
        return {
            "by hand, one at a time": loop(trial.model(), add=True, at_once=1),
            "floor, one at a time": loop(trial.model(), add=False, at_once=1),
            "Keras, bare, XLA": bare(trial.builtin(True), trial.size),
            "ours, split, bare, XLA": bare(trial.split(True), trial.n * trial.size),
            "ours, stream, bare, XLA": bare(trial.stream(True), trial.size, pulled=trial.n),
        }

    return bare, loop, more


def jax(trial):
    """The compiled steps called on arrays, and scans by hand, with donated state."""
    import jax
    from jax import numpy as jnp

    def bare(trained, size, pulled=None):
        trained.make_train_function()
        parts = ["trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables"]
        state = trained._get_jax_state(**dict.fromkeys(parts, True), purge_model_variables=True)

        def run():
            nonlocal state
            iterator = iter(trial.batches(size))
            for _ in range(len(trial.x) // size // (pulled or 1)):
                _, state = trained.train_function(state, iterator)
            jax.block_until_ready(state)

        x, y = trial.batches(size * (pulled or 1))[0]
        given = (x, y) if pulled is None else [tuple(a.reshape(pulled, size, *a.shape[1:]) for a in (x, y))]
        run.bytes = needs(jax.jit(trained.train_step, donate_argnums=0), state, given)
        run.correction = lambda: accumulators(trained)
        return run

    def needs(step, state, *args):
        """What the compiler plans: all of it, and beyond what the step is given."""
        memory = step.lower(state, *args).compile().memory_analysis()
        size = memory.argument_size_in_bytes + memory.output_size_in_bytes
        size += memory.temp_size_in_bytes - memory.alias_size_in_bytes
        return size, size - sum(leaf.nbytes for leaf in jax.tree.leaves((state, args)))

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

        run.bytes = needs(step, state, *trial.batches(trial.n * trial.size)[0])
        return run

    return bare, loop, dict


def torch(trial):
    """Train functions called on tensors, and the loop by hand."""
    import torch

    def bare(trained, size, pulled=None):
        trained.make_train_function()
        pairs = [tuple(map(torch.from_numpy, pair)) for pair in trial.batches(size)]

        def run():
            iterator = iter(pairs)
            for _ in range(len(trial.x) // size // (pulled or 1)):
                trained.train_function(list(itertools.islice(iterator, pulled or 1)))
            wait(trained)

        run.correction = lambda: accumulators(trained)
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
            wait(trained)

        pairs = [tuple(map(torch.from_numpy, pair)) for pair in trial.batches(trial.n * trial.size)]
        return run

    return bare, loop, dict


WAYS = {"tensorflow": tensorflow, "jax": jax, "torch": torch}[BACKEND]
