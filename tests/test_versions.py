"""The versions that are claimed are those that ran."""

import re
import tomllib
from pathlib import Path

import versions

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PAGE = (ROOT / "docs/versions.md").read_text()


def pins(packages, separator):
    """Their versions, such as {"torch": "2.4.1"}."""
    return dict(package.split(separator) for package in packages if separator in package)


def test_the_oldest_columns_are_what_the_extras_claim():
    for column, extras in {
        "torch-oldest": ("torch", "keras"),
        "jax-oldest": ("jax",),
        "keras-jax-oldest": ("jax", "keras-jax"),
        "tf-oldest": ("tensorflow-cpu", "keras"),
    }.items():
        claimed = [requirement for extra in extras for requirement in EXTRAS[extra]]
        assert pins(versions.COLUMNS[column].packages, "==") == pins(claimed, ">="), column
    assert EXTRAS["tensorflow"][0] == EXTRAS["tensorflow-cpu"][0].replace("-cpu", "")


def test_each_oldest_column_has_run_and_passed():
    for name, column in versions.COLUMNS.items():
        for backend in column.backends if name.endswith("-oldest") else ():
            (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| {name} | {backend} |"))
            assert re.search(r"\| \d+ passed(, \d+ deselected)? \|", row), row


def test_a_row_takes_its_place_and_leaves_the_others(tmp_path, monkeypatch):
    page = tmp_path / "versions.md"
    page.write_text("before\n" + "".join(versions.MARKS) + "after\n")
    monkeypatch.setattr(versions, "PAGE", page)
    for row in ("| tf-oldest | tf1 | old |", "| torch-oldest | torch | a |", "| tf-oldest | tf1 | new |"):
        name, backend = row.removeprefix("| ").split(" | ")[:2]
        versions.write({(name, backend): row})
    lines = page.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert lines[4:6] == ["| torch-oldest | torch | a |", "| tf-oldest | tf1 | new |"]
