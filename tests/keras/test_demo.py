"""The demo's promises, in Keras on each backend."""

import keras
import pytest

from bigbatch import cli
from bigbatch.demo import WAYS, Job
from bigbatch.demo.keras import train

# On JAX and PyTorch Keras narrows products of float64 to float32, so there it says no more.
DTYPES = [("float32", 1e-5), ("float64", 1e-12)][: 2 if keras.backend.backend() == "tensorflow" else 1]


@pytest.mark.parametrize(("dtype", "allowed"), DTYPES)
def test_accumulated_weights_are_the_true_batchs(dtype, allowed):
    job = Job(dtype=dtype, epochs=10)
    results = {way: train(way, job, lambda n: None) for way in WAYS if way != "micro"}
    for way in ("stream", "split"):
        assert results[way].updates == results["full"].updates == 20
        assert results[way].distance(results["full"]) <= allowed
        assert results[way].losses[-1][1] == pytest.approx(results["full"].losses[-1][1], rel=1e-4)
    assert results["full"].accuracy > 0.8


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = tmp_path / "demo.png"
    assert cli.main(["demo", "--framework", "keras", "--epochs", "2", "--output", str(output)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Notice: after 4 updates no weight of the accumulated runs is further than" in said
    assert output.read_bytes().startswith(b"\x89PNG")
