"""A process that is killed between any two file operations of a checkpoint resumes to the undisturbed run's weights."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_a_kill_at_any_file_operation_of_a_checkpoint(tmp_path):
    library = tmp_path / "kills.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "kills.c", "-ldl"], check=True)
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, HERE / "killed.py", tmp_path / "runs"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (operations,) = re.findall(r"survived (\d+) operations", done.stdout)
    outcomes = re.findall(r"killed at \d+: went on after (\d+), (\w+)", done.stdout)
    assert len(outcomes) == int(operations) + 1 >= 20
    assert {outcome for _, outcome in outcomes} == {"exact"}
    places = [int(place) for place, _ in outcomes]
    assert places == sorted(places)  # the checkpoint before, until the new one is the latest
    assert set(places) == {6, 7}
