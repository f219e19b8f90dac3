"""The examples and the code in the pages run, and say what they promise."""

import runpy
from pathlib import Path

import pytest

from documentation import run_blocks

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("name", ["stream", "split"])
def test_example(name, capsys):
    runpy.run_path(str(ROOT / f"examples/torch_{name}.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if "loss" in line]
    assert losses[-1] < 0.3 < 2 < losses[0]
    if name == "stream":
        assert lines[-1] == (
            "Accumulator(AdamW, every=64, clip_norm=1.0, scheduler=CosineAnnealingLR: "
            "40 updates made, 0 micro-batches pending)"
        )


@pytest.mark.parametrize(("name", "first", "last"), [("clip", 5.9, 3.9), ("head", 3.2, 2.4)])
def test_example_of_a_coupled_loss(name, first, last, capsys):
    runpy.run_path(str(ROOT / f"examples/torch_{name}.py"))
    losses = [float(line.split("loss ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < last < first < losses[0]


def test_example_of_lengths(capsys):
    runpy.run_path(str(ROOT / "examples/torch_lengths.py"))
    first, *lines = capsys.readouterr().out.splitlines()
    assert float(first.split()[-5]) <= 1.25
    losses = [float(line.split("loss ")[1]) for line in lines]
    assert losses[-1] < 0.5 < 2 < losses[0]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/pytorch.md",
        "docs/lengths.md",
        "docs/faq.md",
        "docs/coming-from.md",
        "docs/semantics.md",
        "docs/memory.md",
    ],
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(ROOT / page)


def test_the_code_of_the_guide_to_coupled_losses_runs():
    assert run_blocks(ROOT / "docs/coupled.md", tab="PyTorch")
