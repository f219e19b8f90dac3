"""Stream: a dataset yields micro-batches of 16, and every 64 of them make one update.

python examples/tensorflow_stream.py
"""

import tensorflow as tf
from sklearn.datasets import load_digits

import bigbatch.tensorflow as bb

tf.keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)
dataset = tf.data.Dataset.from_tensor_slices(((pixels / 16).astype("float32"), labels)).shuffle(2000).batch(16)

model = tf.keras.Sequential([
    tf.keras.layers.Input((64,)),
    tf.keras.layers.Dense(128, "tanh"),
    tf.keras.layers.Dense(10),
])  # fmt: skip
schedule = tf.keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=40)  # 40 updates, not 2,260 micro-batches
optimizer = tf.keras.optimizers.AdamW(schedule, global_clipnorm=1.0)
cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
acc = bb.Accumulator(optimizer, every=64)


@tf.function(reduce_retracing=True)
def train_step(x, y):
    with tf.GradientTape() as tape:
        loss = cross_entropy(y, model(x, training=True))
    grads = tape.gradient(loss, model.trainable_variables)
    pairs = zip(grads, model.trainable_variables, strict=True)
    return acc.apply_gradients(pairs, items=tf.shape(x)[0], loss=loss)


def show(epoch, update):
    print(f"epoch {epoch:2d}  update {update.index:2d}  {update.items:.0f} examples  loss {update.loss:.4f}")


for epoch in range(20):
    for x, y in dataset:
        update = train_step(x, y)
        if update.made:
            show(epoch, update)
    tail = acc.flush()  # the last 49 micro-batches of the epoch are a window of their own
    if tail:
        show(epoch, tail)
print(f"{int(acc.index)} updates made, {int(acc.pending)} micro-batches pending")
