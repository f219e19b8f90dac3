"""Batches of 1,024 on whatever memory there is: `micro_batch="auto"` plans by itself, and `bb.plan` shows its reasons.

python examples/keras_auto.py          with KERAS_BACKEND=tensorflow, jax or torch
"""

import keras
from sklearn.datasets import load_digits

import bigbatch.keras as bb

keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)
pixels = pixels / 16

model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, activation="tanh"), keras.layers.Dense(10)])
model.compile(keras.optimizers.AdamW(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))

plan = bb.plan(model, pixels, labels, batch_size=1024)
plan.show()
half = plan.needs / plan.budget.headroom / 2  # as if half of what the batch needs were free
bb.plan(model, pixels, labels, batch_size=1024, memory=half).show()

bb.accumulate(model, micro_batch="auto")
history = model.fit(pixels, labels, batch_size=1024, epochs=20, verbose=0).history
for epoch, loss in enumerate(history["loss"]):
    print(f"epoch {epoch:2d}  loss {loss:.4f}")
print(f"micro_batch={plan.micro_batch}")
