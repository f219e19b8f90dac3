"""The examples run, and say what they promise."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", ["stream", "split"])
def test_example(name, capsys):
    runpy.run_path(str(ROOT / f"examples/tensorflow_{name}.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if "loss" in line]
    assert losses[-1] < 0.3 < 1.5 < losses[0]
    if name == "stream":
        assert lines[-1] == "40 updates made, 0 micro-batches pending"
