"""Split: batches of 1,024 as they are, with the activations of 32 examples in memory at a time.

python examples/tensorflow_split.py
"""

import tensorflow as tf
from sklearn.datasets import load_digits

import bigbatch.tensorflow as bb

tf.keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)
dataset = tf.data.Dataset.from_tensor_slices(((pixels / 16).astype("float32"), labels)).shuffle(2000).batch(1024)

model = tf.keras.Sequential([
    tf.keras.layers.Input((64,)),
    tf.keras.layers.Dense(128, "tanh"),
    tf.keras.layers.Dense(10),
])  # fmt: skip
optimizer = tf.keras.optimizers.AdamW(1e-2)
cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def loss_fn(batch):
    x, y = batch
    return cross_entropy(y, model(x, training=True))


@tf.function
def train_step(batch):
    # was: with tf.GradientTape() as tape: loss = loss_fn(batch), then tape.gradient(loss, ...)
    loss, grads = bb.value_and_grad(loss_fn, batch, model.trainable_variables, micro_batch=32)
    optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    return loss


for epoch in range(20):
    for batch in dataset:
        loss = train_step(batch)
    print(f"epoch {epoch:2d}  loss {loss:.4f}")
