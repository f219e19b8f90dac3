"""Is accumulation exact for this loss, and is a larger batch worth it? TensorFlow, on scikit-learn's digits.

python examples/tensorflow_honest.py
"""

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import bigbatch.tensorflow as bb

tf.keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = np.asarray(pixels / 16, np.float32), np.asarray(labels)
loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(norm):
    layers = tf.keras.layers
    return tf.keras.Sequential(
        [tf.keras.Input((64,)), layers.Dense(64), norm, layers.Activation("tanh"), layers.Dense(10)]
    )


# Exact? With a BatchNormalization it is not; with a LayerNormalization in its place it is.
for norm in (tf.keras.layers.BatchNormalization(), tf.keras.layers.LayerNormalization()):
    model = network(norm)
    found = bb.audit(
        lambda batch, model=model: loss(batch[1], model(batch[0], training=True)),
        (x[:30], y[:30]), model.trainable_variables, micro_batch=8,
    )  # fmt: skip
    print(found, end="\n\n")


def train(every, epochs):
    """The sizes of the windows, and the Accumulator."""
    acc = bb.Accumulator(tf.keras.optimizers.AdamW(1e-3), every=every, noise=1)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        grads = tape.gradient(value, model.trainable_variables)
        return acc.apply_gradients(zip(grads, model.trainable_variables, strict=True), items=tf.shape(x)[0])

    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=0).batch(16).repeat(epochs)
    updates = [step(*batch) for batch in data]
    return [int(u.micro_batches) for u in updates if u.made], acc


# Worth it? 64 × 16 measures its own noise.
_, acc = train(64, epochs=20)
print("noise scale:", acc.noise_scale)
print(bb.advice(acc.noise_scale, batch=1024, micro_batch=16, beta2=0.999))

# Windows that close when the gradient is known well enough.
sizes, _ = train(bb.until_noise(eta=1.0, at_most=64), epochs=2)
print("windows of", sizes)
