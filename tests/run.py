"""The whole test run: style, types, what needs no framework, then each backend in a process of its own.

python tests/run.py                 everything
python tests/run.py lint torch      some of it
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BACKENDS = ["torch"]
STEPS = {
    "lint": [["ruff", "check"], ["ruff", "format", "--check"], ["pyright"]],
    "core": [["pytest", "-q"]],
    **{backend: [["pytest", "-q", "--backend", backend]] for backend in BACKENDS},
}


def main(asked: list[str]) -> int:
    unknown = set(asked) - set(STEPS)
    if unknown:
        sys.exit(f"unknown steps {sorted(unknown)}; there are {list(STEPS)}")
    # The tests' arrays are small: threads that wait for each other on a busy machine take longer than the work.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    failed = []
    for name in asked or STEPS:
        started = time.perf_counter()
        print(f"== {name}", flush=True)
        for module, *arguments in STEPS[name]:
            if subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment).returncode:
                failed.append(f"{name}: {module}")
        print(f"== {name} took {time.perf_counter() - started:.0f} s", flush=True)
    print("failed: " + ", ".join(failed) if failed else "everything passed", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
