"""Runs the code of a Markdown page: its ```python blocks, in order, in one namespace."""

import re
import textwrap
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.M | re.S)
TAB = re.compile(r'^=== "(.+)"$', re.M)


def run_blocks(page: Path, namespace: dict[str, Any] | None = None, tab: str | None = None) -> int:
    """Runs every block, indented ones too, and returns how many there were. An error points at the line of the page.

    Args:
        page: the Markdown file.
        namespace: what the code finds there; it is written to.
        tab: runs the blocks below `=== "tab"` only, as a reader does who follows one tab.
    """
    text = page.read_text()
    namespace = {"__name__": "__main__"} if namespace is None else namespace
    count = 0
    for block in BLOCK.finditer(text):
        above = [found for found in TAB.finditer(text) if found.start() < block.start()]
        if tab is not None and not (above and above[-1][1] == tab and block[1]):
            continue
        line = text.count("\n", 0, block.start(2))
        exec(compile("\n" * line + textwrap.dedent(block[2]), str(page), "exec"), namespace)
        count += 1
    return count
