"""Batches of 1,024 on whatever memory there is: `micro_batch="auto"` plans by itself, and `bb.plan` shows its reasons.

python examples/tensorflow_auto.py
"""

import tensorflow as tf
from sklearn.datasets import load_digits

import bigbatch.tensorflow as bb

tf.keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)
pixels = (pixels / 16).astype("float32")
# "auto" asks for a batch whose length is known when the graph is built.
dataset = tf.data.Dataset.from_tensor_slices((pixels, labels)).shuffle(2000).batch(1024, drop_remainder=True)

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


batch = pixels[:1024], labels[:1024]
plan = bb.plan(loss_fn, batch, model.trainable_variables)
plan.show()
half = plan.needs / plan.budget.headroom / 2  # as if half of what the batch needs were free
bb.plan(loss_fn, batch, model.trainable_variables, memory=half).show()


@tf.function
def train_step(batch):
    loss, grads = bb.value_and_grad(loss_fn, batch, model.trainable_variables, micro_batch="auto")
    optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
    return loss


for epoch in range(30):
    for batch in dataset:
        loss = train_step(batch)
    print(f"epoch {epoch:2d}  loss {loss:.4f}")
