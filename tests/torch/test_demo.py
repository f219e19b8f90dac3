"""The demo is the mission: its promises, on a shorter run, and the picture it saves."""

import pytest

from bigbatch import cli
from bigbatch.demo import WAYS, Job
from bigbatch.demo.torch import train


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("float64", 1e-12)])
def test_accumulated_weights_are_the_true_batchs(dtype, allowed):
    job = Job(dtype=dtype)
    results = {way: train(way, job, lambda n: None) for way in WAYS if way != "micro"}
    for way in ("stream", "split"):
        assert results[way].updates == results["full"].updates == 60
        assert results[way].distance(results["full"]) <= allowed
        assert results[way].peak_bytes < results["full"].peak_bytes / 3
        assert results[way].losses[-1][1] == pytest.approx(results["full"].losses[-1][1], rel=1e-4)
    assert results["full"].accuracy > 0.95


def test_it_says_what_it_did_and_draws_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "demo.png"
    assert cli.main(["demo", "--framework", "torch", "--epochs", "2", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert all(title in said for title in WAYS.values())
    assert "Notice: after 4 updates no weight of the accumulated runs is further than" in " ".join(said.split())
    assert "…" not in said.split("Would it be exact")[0]  # nothing is cut in 80 columns
    assert "Was the batch worth it?" in said
    assert "not exact: " in said
    assert "An example's output of 1 depends on the other examples" in " ".join(said.split())
    assert output.read_bytes().startswith(b"\x89PNG")
