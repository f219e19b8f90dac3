"""Is accumulation exact for this model, and is a larger batch worth it? Keras, on scikit-learn's digits.

python examples/keras_honest.py         with KERAS_BACKEND=tensorflow, jax or torch
"""

import keras
from sklearn.datasets import load_digits

import bigbatch.keras as bb

keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = pixels / 16, labels


def compiled(norm):
    layers = keras.layers
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64), norm, layers.Activation("tanh"), layers.Dense(10)])
    model.compile(keras.optimizers.AdamW(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


# Exact? With a BatchNormalization it is not; with a LayerNormalization in its place it is.
for norm in (keras.layers.BatchNormalization(), keras.layers.LayerNormalization()):
    model = compiled(norm)
    print(bb.audit(model, x[:30], y[:30], micro_batch=8), end="\n\n")

# Worth it? 64 × 16 measures its own noise.
bb.accumulate(model, every=64, noise=1)
history = model.fit(x, y, batch_size=16, epochs=20, verbose=0).history
print("epoch by epoch:", [round(scale) for scale in history["noise_scale"]])
print("noise scale:", bb.noise_scale(model))
print(bb.advice(bb.noise_scale(model), batch=1024, micro_batch=16, beta2=0.999))
