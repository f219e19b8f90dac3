"""Lists private words where the field has its own: `python tests/words.py`, exit status 1 where it finds some.

It reads `src/`, `docs/` and the README, line by line. Each pattern has the term to write in its place.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
INSTEAD = {
    r"\brooms?\b|\broom_for\b|\brows_for\b": "package (of a framework); headroom, capacity (of memory)",
    r"\bdoors?\b|open_door": "API: split API, stream API",
    r"\bby hand\b": "hand-written",
    r"\bwanted\b": "target",
    r"\bturn(s|ed|ing)?[ _]over\b|\b(is_)?turned\b": "transpose, transposed",
    r"\bput(s|ting)?[ _]off\b|\brows that wait\b": "deferred",
    r"\bmultipl(y|ies|ied)[ _]out\b|\bsettled?\b": "flush the deferred products, compute as one matmul",
    r"\b(?-i:Kept|Owed|Growing|Rows)\b|\bput_together\b": "FactorBuffer, DeferredSum, DeferredAccumulator, concat",
    r"\bvery update\b": "the same update that the full batch would give",
    r"\b(leaves|leave|left|without a|no) trace\b": "has no effect on later windows",
    r"\bnobody waits\b": "needs no device synchronisation",
    r"\bmended\b": "fixed",
    r"\bdealt in turn\b": "strided: i, i + N, i + 2N",
    r"\bwins and losses\b": "benchmarks",
}


def found() -> list[str]:
    """`path:line: word: what to write`, for each private word in a tracked file."""
    names = subprocess.run(["git", "ls-files", "README.md", "docs", "src"], cwd=ROOT, capture_output=True, text=True)
    lines = []
    for name in names.stdout.split():
        path = ROOT / name
        if path.suffix not in (".md", ".py") or not path.exists():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for pattern, instead in INSTEAD.items():
                if match := re.search(pattern, line, re.IGNORECASE):
                    lines.append(f"{name}:{number}: {match[0]}: write {instead}")
    return lines


if __name__ == "__main__":
    print(*found(), sep="\n")
    sys.exit(bool(found()))
