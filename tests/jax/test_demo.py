"""The demo is the mission: its promises, on a shorter run."""

import pytest

from bigbatch.demo import Job
from bigbatch.demo.jax import train
from demonstration import keeps_its_promises, says_and_draws


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("float64", 1e-12)])
def test_accumulated_weights_are_the_true_batchs(dtype, allowed):
    results = keeps_its_promises(train, Job(dtype=dtype, epochs=10), updates=20, allowed=allowed, accuracy=0.8)
    for way in ("stream", "split"):
        assert results[way].peak_bytes < results["full"].peak_bytes / 2


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    says_and_draws("jax", tmp_path / "demo.png", capsys)
