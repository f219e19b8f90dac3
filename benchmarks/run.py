"""`make bench`: every benchmark in a process of its own, one after the other, writing its page.

python benchmarks/run.py              all of them
python benchmarks/run.py torch_window some
"""

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# What other scripts import.
SHARED = {"run", "interleaved", "resident", "keras_ways"}
SCRIPTS = sorted(
    path.stem
    for path in HERE.glob("*.py")
    if path.stem not in SHARED and not path.stem.endswith("_jobs") and not path.stem.startswith("growth_")
)

# One framework a process, and Keras takes its backend from the environment when it is imported.
GROWTH = ["torch", "jax", "tensorflow", "tf1", "keras_tensorflow", "keras_jax", "keras_torch"]
# glibc gives memory back between windows and takes it again, at the cost of thousands of page faults a window. Whatever
# the thresholds, that is so of blocks over 64 MiB in threads that have an arena of their own. What a contender pays for
# that says nothing of its loop.
KEEPING = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
}
AS_IT_STANDS = dict.fromkeys(KEEPING)
# JAX's threads would wait for each other in one arena: only where its blocks are so large is that the lesser evil.
MANY_ARENAS = {"MALLOC_ARENA_MAX": None}

SMALL = ["mlp-1", "mlp-16", "mlp-128", "convolutional"]
PARTS = {
    "coupled": [([], {}), (["head"], AS_IT_STANDS)],
    "growth": [([framework], {}) for framework in GROWTH],
    "jax_window": [([*SMALL, "mlp-32"], MANY_ARENAS), (["transformer"], {})],
    "keras_fit": [
        ([], {"KERAS_BACKEND": "tensorflow"}),
        (SMALL, {"KERAS_BACKEND": "jax", **MANY_ARENAS}),
        (["transformer"], {"KERAS_BACKEND": "jax"}),
        ([], {"KERAS_BACKEND": "torch"}),
    ],
    "torch_window": [([], {}), (["mlp-16", "transformer"], AS_IT_STANDS)],
}


def main(asked: list[str]) -> int:
    unknown = set(asked) - set(SCRIPTS)
    if unknown:
        sys.exit(f"unknown benchmarks {sorted(unknown)}; there are {SCRIPTS}")
    failed = []
    for name in asked or SCRIPTS:
        for arguments, more in PARTS.get(name, [([], {})]):
            environment = {**KEEPING, **os.environ, **more}
            environment = {key: value for key, value in environment.items() if value is not None}
            part = " ".join([name, *arguments, *filter(None, more.values())])
            print("==", part, flush=True)
            started = time.perf_counter()
            script = [sys.executable, HERE / f"{name}.py", *arguments, "--write"]
            if subprocess.run(script, cwd=HERE.parent, env=environment).returncode:
                failed.append(part)
            print("==", part, f"took {time.perf_counter() - started:.0f} s", flush=True)
    print("failed: " + ", ".join(failed) if failed else "all ran", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
