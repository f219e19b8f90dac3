"""A contrastive loss over batches of 512 pairs, with the activations of 32 pairs in memory at a time.

The two halves of a digit are a pair; two encoders learn which halves belong together. Each is told from the other 511
of its batch, so cutting the batch would make another loss: `loss_over="batch"` cuts the encoders' work alone.

python examples/keras_contrastive.py          with KERAS_BACKEND=tensorflow, jax or torch
"""

import keras
from keras import layers, ops
from sklearn.datasets import load_digits

import bigbatch.keras as bb

DIM = 16


def info_nce(_, y_pred):
    """Each half's cross-entropy over the halves of the whole batch."""
    a, b = y_pred[:, :DIM], y_pred[:, DIM:]
    logits = ops.matmul(ops.normalize(a), ops.transpose(ops.normalize(b))) / 0.1
    places = ops.arange(ops.shape(a)[0])
    return ops.sparse_categorical_crossentropy(places, logits, from_logits=True)


def encoder():
    return keras.Sequential([layers.Dense(128, activation="tanh"), layers.Dropout(0.1), layers.Dense(DIM)])


keras.utils.set_random_seed(0)
pixels, labels = load_digits(return_X_y=True)
digits = keras.Input((64,))
model = keras.Model(digits, layers.Concatenate()([encoder()(digits[:, :32]), encoder()(digits[:, 32:])]))
model.compile(keras.optimizers.Adam(3e-3), info_nce)
bb.accumulate(model, micro_batch=32, loss_over="batch")  # the one line
history = model.fit(pixels / 16, labels, batch_size=512, epochs=15, verbose=0).history
for epoch, loss in enumerate(history["loss"]):
    print(f"epoch {epoch:2d}  loss {loss:.4f}")
