"""Stream: a data set yields micro-batches of 16, and every 64 of them make one update.

python examples/keras_stream.py         with KERAS_BACKEND=tensorflow, jax or torch
"""

import keras
from sklearn.datasets import load_digits

import bigbatch.keras as bb

keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)


class MicroBatches(keras.utils.PyDataset):
    """A data set that cannot yield more than 16 examples at once."""

    def __len__(self):
        return -(-len(labels) // 16)

    def __getitem__(self, i):
        rows = slice(16 * i, 16 * (i + 1))
        return pixels[rows] / 16, labels[rows]


model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, activation="tanh"), keras.layers.Dense(10)])
schedule = keras.optimizers.schedules.CosineDecay(1e-2, decay_steps=40)  # 40 updates, not 2,260 micro-batches
model.compile(
    keras.optimizers.AdamW(schedule, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
bb.accumulate(model, every=64)
history = model.fit(MicroBatches(), epochs=20, verbose=0).history
for epoch, loss in enumerate(history["loss"]):
    print(f"epoch {epoch:2d}  loss {loss:.4f}")
print(f"{int(model.optimizer.iterations)} updates: an epoch's 113 micro-batches are a window of 64 and one of 49")
