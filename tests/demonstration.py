"""What the demo promises in every framework, on a run of any length, and what its command says and draws."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigbatch import cli
from bigbatch.demo import WAYS, Job, Result


def keeps_its_promises(train: Callable[..., Result], job: Job, *, updates: int, allowed: float, accuracy: float) -> Any:
    """Stream and split end at the true batch's weights; returns each way's result."""
    results = {way: train(way, job, lambda n: None) for way in WAYS if way != "micro"}
    for way in ("stream", "split"):
        assert results[way].updates == results["full"].updates == updates
        assert results[way].distance(results["full"]) <= allowed
        assert results[way].losses[-1][1] == pytest.approx(results["full"].losses[-1][1], rel=1e-4)
    assert results["full"].accuracy > accuracy
    return results


def says_and_draws(framework: str, output: Path, capsys: Any) -> str:
    """Runs the command for two epochs, at the terminal's width; returns what it said, its lines as they were."""
    assert cli.main(["demo", "--framework", framework, "--epochs", "2", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "Notice: after 4 updates no weight of the accumulated runs is further than" in " ".join(said.split())
    assert output.read_bytes().startswith(b"\x89PNG")
    return said
