"""The examples and the code in the page run, and say what they promise."""

import runpy
from pathlib import Path

import jax
import pytest

from documentation import run_blocks

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _as_jax_comes():
    """The examples in JAX's default precision, which the laws' tests are not in."""
    with jax.enable_x64(False):
        yield


@pytest.mark.parametrize("name", ["stream", "split", "nnx", "equinox"])
def test_example(name, capsys):
    runpy.run_path(str(ROOT / f"examples/jax_{name}.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines]
    assert losses[-1] < 0.3 < 0.8 < losses[0]
    if name == "stream":
        assert lines[-2].startswith("epoch 19  update 38  1024 examples")
        assert lines[-1].startswith("epoch 19  update 39  773 examples")


def test_example_of_a_coupled_loss(capsys):
    runpy.run_path(str(ROOT / "examples/jax_clip.py"))
    losses = [float(line.split("loss ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < 3.7 < 5.9 < losses[0]


def test_the_code_of_the_page_runs():
    assert run_blocks(ROOT / "docs/jax.md")


def test_the_code_of_the_guide_to_coupled_losses_runs():
    assert run_blocks(ROOT / "docs/coupled.md", tab="JAX")
