"""The demo's promises, in Keras on each backend."""

import keras
import pytest

from bigbatch.demo import Job
from bigbatch.demo.keras import train
from demonstration import keeps_its_promises, says_and_draws

# On JAX and PyTorch Keras narrows products of float64 to float32, so there it says no more.
DTYPES = [("float32", 1e-5), ("float64", 1e-12)][: 2 if keras.backend.backend() == "tensorflow" else 1]


@pytest.mark.parametrize(("dtype", "allowed"), DTYPES)
def test_accumulated_weights_are_the_true_batchs(dtype, allowed):
    keeps_its_promises(train, Job(dtype=dtype, epochs=10), updates=20, allowed=allowed, accuracy=0.8)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = says_and_draws("keras", tmp_path / "demo.png", capsys)
    assert "Was the batch worth it?" in said
    assert "not exact: " in said
    assert "output of batch_normalization depends on the other examples" in " ".join(said.split())
