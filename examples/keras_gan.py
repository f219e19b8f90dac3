"""Two optimizers in a train_step of your own: a GAN, with 64 of each batch of 512 in memory at a time.

`bigbatch.keras` takes the place of train_step. A model that has its own calls the split API of its backend there, once
for each optimizer.

python examples/keras_gan.py            with KERAS_BACKEND=tensorflow, jax or torch
"""

import keras
import numpy as np
from keras import layers, ops

BACKEND = keras.backend.backend()
real_or_not = keras.losses.BinaryCrossentropy(from_logits=True)


def network(inputs, outputs):
    return keras.Sequential([keras.Input((inputs,)), layers.Dense(32, activation="tanh"), layers.Dense(outputs)])


class Losses(keras.Model):
    """A generator of points from noise, a discriminator of points, and the loss of each. A batch is (points, noise)."""

    def __init__(self, micro_batch):
        super().__init__()
        self.generator, self.discriminator = network(2, 2), network(2, 1)
        self.micro_batch = micro_batch
        self.built = True

    def compile(self, generator_optimizer, discriminator_optimizer):
        # On JAX fit hands train_step the state of one optimizer, so the step is compiled in here.
        super().compile(optimizer=generator_optimizer, run_eagerly=BACKEND == "jax")
        self.discriminator_optimizer = discriminator_optimizer
        self.optimizer.build(self.generator.trainable_variables)
        discriminator_optimizer.build(self.discriminator.trainable_variables)

    def call(self, noise):
        return self.generator(noise)

    def discriminator_loss(self, batch):
        points, noise = batch
        real, fake = self.discriminator(points), self.discriminator(self.generator(noise))
        return real_or_not(ops.ones_like(real), real) + real_or_not(ops.zeros_like(fake), fake)

    def generator_loss(self, batch):
        _, noise = batch
        fake = self.discriminator(self.generator(noise))
        return real_or_not(ops.ones_like(fake), fake)

    def parts(self):
        return (
            ("discriminator", self.discriminator_loss, self.discriminator, self.discriminator_optimizer),
            ("generator", self.generator_loss, self.generator, self.optimizer),
        )


if BACKEND == "tensorflow":
    import bigbatch.tensorflow as bb

    class Gan(Losses):
        def train_step(self, batch):
            losses = {}
            for name, loss_fn, network, optimizer in self.parts():
                variables = [v.value for v in network.trainable_variables]
                # was: with tf.GradientTape() as tape: loss = loss_fn(batch), then tape.gradient(loss, variables)
                losses[name], gradients = bb.value_and_grad(loss_fn, batch, variables, micro_batch=self.micro_batch)
                optimizer.apply(gradients, network.trainable_variables)
            return losses

elif BACKEND == "torch":
    import bigbatch.torch as bb

    class Gan(Losses):
        def train_step(self, batch):
            losses = {}
            for name, loss_fn, network, optimizer in self.parts():
                self.zero_grad()
                losses[name] = bb.backward(
                    loss_fn, batch, micro_batch=self.micro_batch
                )  # was: loss_fn(batch).backward()
                optimizer.apply([v.value.grad for v in network.trainable_variables], network.trainable_variables)
            return losses

else:
    import functools

    import jax

    import bigbatch.jax as bb

    class Gan(Losses):
        @functools.partial(jax.jit, static_argnums=0)
        def updates(self, weights, slots, batch):
            losses = {}
            for name, loss_fn, _, optimizer in self.parts():

                def pure(values, batch, name=name, loss_fn=loss_fn, weights=weights):
                    values = {**weights, name: values}
                    pairs = [zip(part.trainable_variables, values[of], strict=True) for of, _, part, _ in self.parts()]
                    with keras.StatelessScope([pair for several in pairs for pair in several]):
                        return loss_fn(batch)

                value_and_grad = bb.value_and_grad(pure, micro_batch=self.micro_batch)  # was: jax.value_and_grad(pure)
                losses[name], gradients = value_and_grad(weights[name], batch)
                applied = optimizer.stateless_apply(slots[name], gradients, weights[name])
                weights, slots = {**weights, name: applied[0]}, {**slots, name: applied[1]}
            return losses, weights, slots

        def train_step(self, state, batch):
            trainable, non_trainable, optimizer_variables, metrics = state
            n = len(self.generator.trainable_variables)
            others = self.discriminator_optimizer.variables
            weights = {"generator": trainable[:n], "discriminator": trainable[n:]}
            slots = {"generator": optimizer_variables, "discriminator": [v.value for v in others]}
            losses, weights, slots = self.updates(weights, slots, batch)
            for v, value in zip(others, slots["discriminator"], strict=True):
                v.assign(value)
            trainable = [*weights["generator"], *weights["discriminator"]]
            return losses, (trainable, non_trainable, slots["generator"], metrics)


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    points = rng.normal((2, 1), 0.5, (2048, 2)).astype("float32")
    noise = rng.normal(size=(2048, 2)).astype("float32")

    gan = Gan(micro_batch=64)
    gan.compile(keras.optimizers.Adam(5e-3, beta_1=0.5), keras.optimizers.Adam(5e-3, beta_1=0.5))
    for epoch in range(4):
        gan.fit(points, noise, batch_size=512, epochs=5, verbose=0)
        x, y = gan.predict(noise, verbose=0).mean(0)
        print(f"epoch {5 * epoch + 5:2d}  the points' mean {x:.2f} {y:.2f}")
