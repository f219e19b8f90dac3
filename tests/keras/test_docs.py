"""The examples and the page's code run on every backend, and say what they promise."""

import runpy
from pathlib import Path

import keras
import pytest

from documentation import run_blocks

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _float32():
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("name", ["stream", "split"])
def test_example(name, capsys):
    runpy.run_path(str(ROOT / f"examples/keras_{name}.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if "loss" in line]
    assert losses[-1] < 0.5 < 2 < losses[0]
    if name == "stream":
        assert lines[-1] == "40 updates: an epoch's 113 micro-batches are a window of 64 and one of 49"


def test_contrastive_example(capsys):
    runpy.run_path(str(ROOT / "examples/keras_contrastive.py"))
    losses = [float(line.split("loss ")[1]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert losses[-1] < 4.7 < 6 < losses[0]


def test_the_pages_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(ROOT / "docs/keras.md") == 9


def test_the_code_of_the_guide_to_coupled_losses_runs():
    assert run_blocks(ROOT / "docs/coupled.md", tab="Keras")
