"""`make bench`: every benchmark in a process of its own, one after the other, writing its page.

python benchmarks/run.py              all of them
python benchmarks/run.py pytorch      some
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARED = {"run", "interleaved", "torch_jobs", "jax_jobs", "keras_jobs"}
SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SHARED)

# Keras takes its backend from the environment when it is imported.
SEVERAL = {"keras_fit": [{"KERAS_BACKEND": backend} for backend in ("tensorflow", "jax", "torch")]}

# One framework a process.
PARTS = {"growth": [["torch"], ["jax"]]}

# glibc gives memory back between windows and takes it again, at the cost of thousands of page faults a window.
ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 30), **os.environ}


def main(asked: list[str]) -> int:
    unknown = set(asked) - set(SCRIPTS)
    if unknown:
        sys.exit(f"unknown benchmarks {sorted(unknown)}; there are {SCRIPTS}")
    failed = []
    for name in asked or SCRIPTS:
        for more in SEVERAL.get(name, [{}]):
            for part in PARTS.get(name, [[]]):
                print("==", name, *part, *more.values(), flush=True)
                script = [sys.executable, HERE / f"{name}.py", *part, "--write"]
                if subprocess.run(script, cwd=HERE.parent, env=ENVIRONMENT | more).returncode:
                    failed.append(" ".join([name, *part, *more.values()]))
    print("failed: " + ", ".join(failed) if failed else "all ran", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
