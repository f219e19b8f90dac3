"""Keras's two APIs on the JAX backend, which Keras takes from the environment when it is imported."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from conformance.keras_driver import ADAPTERS as ADAPTERS
