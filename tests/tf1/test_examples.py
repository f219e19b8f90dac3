"""The example and the page run, and the demo agrees with the true batch."""

import runpy
from pathlib import Path

import pytest

from documentation import run_blocks

ROOT = Path(__file__).parent.parent.parent


def test_the_example(capsys):
    runpy.run_path(str(ROOT / "examples/tf1_stream.py"))
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split("loss ")[1]) for line in lines if "loss" in line]
    assert len(losses) == 40
    assert losses[-1] < 0.3 < 2 < losses[0]
    assert lines[-1] == "40 updates made, 0 micro-batches pending"


def test_the_demo_agrees_with_the_true_batch():
    from bigbatch.demo import Job
    from bigbatch.demo.tf1 import train

    job = Job(dtype="float64", epochs=2)
    seen = []
    results = {way: train(way, job, seen.append) for way in ("micro", "full", "stream", "split")}
    assert {way: result.updates for way, result in results.items()} == {
        "micro": 180,
        "full": 4,
        "stream": 4,
        "split": 4,
    }
    for way in ("stream", "split"):
        assert results[way].distance(results["full"]) < 1e-12
        assert dict(results[way].losses) == pytest.approx(dict(results["full"].losses))
    assert results["micro"].distance(results["full"]) > 1e-2
    assert sum(seen) == 4 * 2 * 1437


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(ROOT / "docs/tf1.md")
