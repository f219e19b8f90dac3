"""Keras's documented flow with its types. Type checkers read this file, and nothing runs it."""

from typing import assert_type

import keras  # type: ignore[import-untyped]
import numpy as np

import bigbatch.keras as bb

x, y = np.ones((96, 8)), np.ones((96, 2))
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(2)])
model.compile("adam", "mse")
bb.accumulate(model, every=64, partial="drop")
bb.accumulate(model, micro_batch="auto", noise=True)
model.fit(x, y, batch_size=96)
assert_type(bb.noise_scale(model), bb.NoiseScale)
assert_type(bb.plan(model, x, y, batch_size=96).micro_batch, int)
