"""Keras's two APIs on the PyTorch backend, which Keras takes from the environment when it is imported."""

import os

os.environ["KERAS_BACKEND"] = "torch"

from conformance.keras_driver import ADAPTERS as ADAPTERS
