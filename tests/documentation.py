"""Runs the code of a Markdown page: its ```python blocks, in order, in one namespace."""

import re
from pathlib import Path
from typing import Any


def run_blocks(page: Path, namespace: dict[str, Any] | None = None) -> int:
    """Runs every block and returns how many there were. An error points at the line of the page."""
    text = page.read_text()
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)
    return len(blocks)
