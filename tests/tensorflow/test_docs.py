"""The code of the page runs, and says what it promises."""

from pathlib import Path

from documentation import run_blocks

ROOT = Path(__file__).parent.parent.parent


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(ROOT / "docs/tensorflow.md")


def test_the_code_of_the_guide_to_coupled_losses_runs():
    assert run_blocks(ROOT / "docs/coupled.md", tab="TensorFlow")
