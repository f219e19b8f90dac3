"""The demo is the mission: its promises, on a shorter run, and the picture it saves."""

import pytest

from bigbatch.demo import WAYS, Job
from bigbatch.demo.torch import train
from demonstration import keeps_its_promises, says_and_draws


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("float64", 1e-12)])
def test_accumulated_weights_are_the_true_batchs(dtype, allowed):
    results = keeps_its_promises(train, Job(dtype=dtype), updates=60, allowed=allowed, accuracy=0.95)
    for way in ("stream", "split"):
        assert results[way].peak_bytes < results["full"].peak_bytes / 3


def test_it_says_what_it_did_and_draws_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = says_and_draws("torch", tmp_path / "demo.png", capsys)
    assert all(title in said for title in WAYS.values())
    assert "…" not in said.split("Would it be exact")[0]  # nothing is cut in 80 columns
    assert "Was the batch worth it?" in said
    assert "not exact: " in said
    assert "An example's output of 1 depends on the other examples" in " ".join(said.split())
