"""The examples under torchrun, as their first lines say; killed too, and then going on."""

import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def torchrun(name, *arguments, restarts=0, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", str(ROOT / "examples" / name)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def ends(process, seconds=120):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out.splitlines()


def test_ddp_killed_at_random_points_ends_with_the_same_weights(tmp_path):
    epochs = ("--epochs", 60)
    undisturbed = ends(torchrun("torch_ddp.py", *epochs))
    losses = [float(line.split("loss ")[1]) for line in undisturbed if "loss" in line]
    assert losses[-1] < 0.01 < 0.5 < losses[0]
    checkpoint, draw = tmp_path / "digits.pt", random.Random(0)
    process = torchrun("torch_ddp.py", *epochs, "--checkpoint", checkpoint, restarts=2)
    for _ in range(2):
        started = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == started:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        time.sleep(draw.random() / 4)
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        subprocess.run(["kill", "-9", draw.choice(workers.stdout.split())], check=True)
    assert ends(process)[-2:] == undisturbed[-2:]
