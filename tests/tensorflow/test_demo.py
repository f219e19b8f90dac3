"""The demo's promises, in TensorFlow."""

import pytest

from bigbatch.demo import WAYS, Job
from bigbatch.demo.tensorflow import train
from demonstration import keeps_its_promises, says_and_draws


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("float64", 1e-12)])
def test_accumulated_weights_are_the_true_batchs(dtype, allowed):
    keeps_its_promises(train, Job(dtype=dtype, epochs=10), updates=20, allowed=allowed, accuracy=0.9)


def test_it_says_what_it_did_and_draws_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = says_and_draws("tensorflow", tmp_path / "demo.png", capsys)
    assert all(title in said for title in WAYS.values())
