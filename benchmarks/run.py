"""`make bench`: every benchmark in a process of its own, one after the other, writing its page.

python benchmarks/run.py              all of them
python benchmarks/run.py pytorch      some
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SHARED = {"run", "interleaved"}
SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SHARED)


def main(asked: list[str]) -> int:
    unknown = set(asked) - set(SCRIPTS)
    if unknown:
        sys.exit(f"unknown benchmarks {sorted(unknown)}; there are {SCRIPTS}")
    failed = []
    for name in asked or SCRIPTS:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, str(HERE / f"{name}.py"), "--write"], cwd=HERE.parent).returncode:
            failed.append(name)
    print("failed: " + ", ".join(failed) if failed else "all ran", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
