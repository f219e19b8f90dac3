"""Split: arrays in batches of 1,024, with the activations of 32 examples in memory at a time.

python examples/keras_split.py          with KERAS_BACKEND=tensorflow, jax or torch
"""

import keras
from sklearn.datasets import load_digits

import bigbatch.keras as bb

keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)

model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, activation="tanh"), keras.layers.Dense(10)])
model.compile(
    keras.optimizers.AdamW(1e-2),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
)
bb.accumulate(model, micro_batch=32)  # the one line
history = model.fit(pixels / 16, labels, batch_size=1024, epochs=20, verbose=0).history
for epoch, (loss, accuracy) in enumerate(zip(history["loss"], history["accuracy"], strict=True)):
    print(f"epoch {epoch:2d}  accuracy {accuracy:.3f}  loss {loss:.4f}")
