"""What mkdocs needs to know of this repository: pages that lie outside `docs/`, and links to files of code."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files, config):
    """Adds the benchmarks' pages and pictures, the changelog and the guide for contributors."""
    for path in sorted((ROOT / "benchmarks").glob("*.md")) + sorted((ROOT / "benchmarks").glob("*.png")):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    for name, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links at the site's pages; a file that is on no page keeps its name and loses its link."""
    folder = {"changelog.md": "", "contributing.md": ""}.get(page.file.src_uri, "docs/")
    folder = "benchmarks/" if page.file.src_uri.startswith("benchmarks/") else folder

    def linked(match):
        text, target, anchor = match.groups()
        path = (ROOT / folder / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        name = str(path.relative_to(ROOT))
        at = ELSEWHERE.get(name) or name.removeprefix("docs/")
        if files.get_file_from_path(at) is None:
            return f"`{name}`" if text == name or text in name else f"{text} (`{name}`)"
        up = "../" * page.file.src_uri.count("/")
        return f"[{text}]({up}{at}{anchor or ''})"

    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", linked, markdown)


def on_page_content(html, page, config, files):
    """Docstrings announce a block of code with two colons, as Sphinx and `help` know them; one is for readers."""
    return html.replace("::</p>", ":</p>")
