"""MultiWorkerMirroredStrategy: two processes on loopback, with unequal items, make the big batch's updates."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from conformance.adapters.tensorflow import CPUS  # noqa: F401  (before TensorFlow runs anything)

WORKER = Path(__file__).parent / "worker.py"


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def by_hand():
    """The big batch, on one device; the flush at the end has 2 micro-batches of each worker."""
    data = runpy.run_path(str(WORKER))["data"]()
    w, optimizer = tf.Variable(tf.constant([1.0, 2.0, 3.0], tf.float64)), tf.keras.optimizers.SGD(0.1, momentum=0.9)
    for window in (data, data, data[:2]):
        x = np.concatenate([part for parts in window for part in parts])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.tanh(tf.linalg.matvec(x, w)) ** 2)
        optimizer.apply_gradients([(tape.gradient(loss, w), w)])
    return w.numpy()


def test_two_workers(tmp_path):
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    workers = []
    for task in range(2):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": task}})
        environment = {**os.environ, "TF_CONFIG": config, "TF_CPP_MIN_LOG_LEVEL": "2"}
        workers.append(
            subprocess.Popen(
                [sys.executable, WORKER, str(task)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [worker.communicate(timeout=240) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (said, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors[-4000:]
        result = json.loads(said.splitlines()[-1])
        assert result["replicas"] == 2
        assert result["moved"] == [False, False, False, True, False, False, False, True, False, False]
        assert (result["pending"], result["items"]) == (2, 10.0)
        np.testing.assert_allclose(result["w"], by_hand(), rtol=1e-12)
