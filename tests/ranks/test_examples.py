"""The examples under torchrun, as their first lines say; killed too, and then going on."""

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# torchrun 2.13 otherwise gives restarted ranks the store of the last start, with the addresses of dead ranks in it.
ENVIRONMENT = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(name, *arguments, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", str(ROOT / "examples" / name)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )


def ends(process, seconds=300):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out.splitlines()


def killed(name, checkpoint, times, *arguments):
    """A run whose ranks get `kill -9` at random points, one at a time and after it has got somewhere each time."""
    draw, before = random.Random(0), set()
    process = torchrun(name, *arguments, "--checkpoint", checkpoint, restarts=times + 1)

    def ranks():
        command = ["pgrep", "-P", str(process.pid), "-f", f" -u .*{name}"]
        return set(subprocess.run(command, capture_output=True, text=True).stdout.split())

    for _ in range(times):
        while len(ranks() - before) < 2:  # of this start, not of the last
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(draw.random() / 4)
        before = ranks()
        subprocess.run(["kill", "-9", draw.choice(sorted(before))], check=True)
    return process


def test_ddp_killed_at_a_random_point_ends_with_the_same_weights(tmp_path):
    epochs = ("--epochs", 100)
    undisturbed = ends(torchrun("torch_ddp.py", *epochs))
    losses = [float(line.split("loss ")[1]) for line in undisturbed if "loss" in line]
    assert losses[-1] < 0.01 < 0.5 < losses[0]
    assert ends(killed("torch_ddp.py", tmp_path / "digits.pt", 1, *epochs))[-2:] == undisturbed[-2:]


def test_fsdp2_goes_on_from_its_checkpoint_with_the_same_weights(tmp_path):
    straight = ends(torchrun("torch_fsdp2.py", "--epochs", 6, "--checkpoint", tmp_path))
    learned(straight, updates=6 * 8)
    for epoch in range(4, 7):
        shutil.rmtree(tmp_path / f"{epoch:04d}")
    resumed = ends(torchrun("torch_fsdp2.py", "--epochs", 6, "--checkpoint", tmp_path))
    assert len(resumed) == 3 + 2
    assert resumed[-2:] == straight[-2:]


@pytest.mark.parametrize("name", ["accelerate", "lightning"])
def test_inside_other_peoples_loops(name):
    learned([line for line in ends(torchrun(f"torch_{name}.py")) if line], updates=10 * 8)


def learned(lines, updates):
    losses = [float(line.split("loss ")[1]) for line in lines if "  loss " in line]
    assert losses[-1] < 0.2 < 0.4 < losses[0]
    assert f"{updates} updates made, 0 micro-batches pending)" in "".join(lines[-2:])


def test_the_code_of_the_page_runs():
    code = "import sys; from pathlib import Path; from documentation import run_blocks; run_blocks(Path(sys.argv[1]))"
    # In a process of its own: it makes a process group.
    subprocess.run([sys.executable, "-c", code, str(ROOT / "docs/ranks.md")], cwd=ROOT / "tests", check=True)
