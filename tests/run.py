"""The whole test run: style, types, what needs no framework, then each backend in a process of its own.

python tests/run.py                 everything, as many steps at a time as there are cores
python tests/run.py lint torch      some of it
"""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The longest first, so that the cores are done at the same time.
BACKENDS = ["keras_tensorflow", "jax", "keras_jax", "tensorflow", "ranks", "trainers", "torch", "tf1", "keras_torch"]
STEPS = {
    "lint": [
        ["-m", "ruff", "check"],
        ["-m", "ruff", "format", "--check"],
        ["-m", "pyright"],
        # Keras's and TensorFlow's own types do not pass; their documented flows are in tests/typed.
        [
            "-m",
            "pyright",
            "tests/typed",
            *(str(p) for kind in ("torch", "jax", "tf1") for p in ROOT.glob(f"examples/{kind}_*.py")),
        ],
        ["-m", "mypy", "--strict", "tests/typed"],
        ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        ["tests/words.py"],
    ],
    "newest": [["tests/versions.py", "quick"]],
    "docs": [["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", "site"]],
    "package": [["tests/release.py", "check"]],
    "core": [["-m", "pytest", "-q"]],
    **{backend: [["-m", "pytest", "-q", "--durations=10", "--backend", backend]] for backend in BACKENDS},
}
# The tests' arrays are small: threads that wait for each other on a busy machine take longer than the work.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "PYTHONUNBUFFERED": "1",
    "NO_MKDOCS_2_WARNING": "1",
}


def run(name: str) -> tuple[str, bool, str, float]:
    """One step: its name, whether it passed, what it printed, and the seconds it took."""
    started, passed, output = time.perf_counter(), True, ""
    for arguments in STEPS[name]:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        passed, output = passed and done.returncode == 0, output + done.stdout
    return name, passed, output, time.perf_counter() - started


def main(asked: list[str]) -> int:
    unknown = set(asked) - set(STEPS)
    if unknown:
        sys.exit(f"unknown steps {sorted(unknown)}; there are {list(STEPS)}")
    steps, failed = asked or list(STEPS), []
    print(f"{len(steps)} steps: {', '.join(steps)}", flush=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in as_completed([pool.submit(run, name) for name in steps]):
            name, passed, output, seconds = done.result()
            print(f"== {name}: {'passed' if passed else 'FAILED'} in {seconds:.0f} s\n{output}", flush=True)
            failed += [] if passed else [name]
    print("failed: " + ", ".join(failed) if failed else "everything passed", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
