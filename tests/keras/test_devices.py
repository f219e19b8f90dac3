"""Two devices, on the backends where Keras spreads a batch over them."""

import os
import subprocess
import sys
from pathlib import Path

from conformance.keras_parity import BACKEND

HERE = Path(__file__).parent

if BACKEND != "torch":

    def test_two_devices():
        paths = os.pathsep.join([str(HERE.parent), *sys.path])
        environment = {**os.environ, "PYTHONPATH": paths, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command = [sys.executable, str(HERE / "on_two_devices.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        assert done.stdout.count("exact on two devices") == 5
        assert "The noise scale is measured on one device. Received: noise=True, 2 devices." in done.stdout
        assert "An audit runs on one device. Received: 2 devices." in done.stdout
