"""How the house is built: what imports what, where facts stand, and that public names say what they are."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src/bigbatch"
# What each room may import, beside the standard library, NumPy and bigbatch's own shared files.
ROOMS = {"torch": {"torch"}, "jax": {"jax", "optax"}, "keras": {"keras", "tensorflow", "jax", "torch"},
         "tensorflow": {"tensorflow"}, "tf1": {"tensorflow"}}  # fmt: skip
FRAMEWORKS = set().union(*ROOMS.values())
BUILT = [room for room in ROOMS if (SOURCE / room).is_dir()]
README = (ROOT / "README.md").read_text()


def imports(path):
    """Every module that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_importing_bigbatch_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import bigbatch; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == ["bigbatch"]


@pytest.mark.parametrize("path", sorted(SOURCE.glob("*.py")), ids=lambda path: path.name)
def test_what_rooms_share_knows_no_framework(path):
    assert not {name.split(".")[0] for name in imports(path)} & (FRAMEWORKS | {"numpy"})


@pytest.mark.parametrize("room", BUILT)
def test_no_room_imports_another(room):
    for path in (SOURCE / room).rglob("*.py"):
        names = set(imports(path))
        assert not {n.split(".")[0] for n in names} & (FRAMEWORKS - ROOMS[room]), path
        others = {n for n in names if n.startswith("bigbatch.") and n.split(".")[1] in set(ROOMS) - {room}}
        assert not others, f"{path} imports {others}"


def test_an_engine_knows_its_framework_and_no_room():
    of_none = {SOURCE / f"engines/{name}.py" for name in ("activations", "captures", "randomness")}  # of Python, NumPy
    for path in set((SOURCE / "engines").glob("[!_]*.py")) - of_none:
        names, own = set(imports(path)), path.stem.split("_")[0]
        assert {n.split(".")[0] for n in names} & FRAMEWORKS == {own}, path
        assert not {n for n in names if n.startswith("bigbatch.") and n.split(".")[1] in ROOMS}, path


@pytest.mark.parametrize("room", BUILT)
def test_a_room_has_its_doors_and_its_papers(room):
    doors = {"tf1": {"stream.py"}, "keras": {"__init__.py"}}.get(room, {"split.py", "stream.py"})
    assert doors <= {path.name for path in (SOURCE / room).iterdir()}
    pages = {"torch": "pytorch.md"}
    page = (ROOT / "docs" / pages.get(room, f"{room}.md")).read_text()
    headings = re.findall(r"^## (.+)$", page, re.M)
    assert headings == [
        "Split: you hold the batch", "Stream: your loader yields micro-batches", "Options", "Saving and resuming",
        "Precision", "Speed", "Limits", "What the built-in does differently",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_public_names_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert ast.get_docstring(tree), f"{path.name} has no docstring"

    def undocumented(body):
        for node in body:
            if isinstance(node, kinds) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    yield node.name
                if isinstance(node, ast.ClassDef):
                    yield from (f"{node.name}.{name}" for name in undocumented(node.body))

    assert not list(undocumented(tree.body))


def test_pins_stand_in_one_place():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    required = {re.split(r"[\[<>=~! ]", r)[0] for several in extras.values() for r in several} - {"bigbatch"}
    assert required <= set(pins), f"not pinned: {required - set(pins)}"
    assert not any("==" in r for several in extras.values() for r in several)


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]


def anchors(page):
    """The names of a page's headings, as links give them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}#{anchor}"


def test_a_package_index_shows_no_link_that_leads_nowhere():
    """There is no repository beside the page, so the names stay and the links go."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    (rule,) = metadata["fancy-pypi-readme"]["substitutions"]
    shown = re.sub(rule["pattern"], rule["replacement"], README)
    assert not re.findall(r"\]\((?!https://)[^)]*\)", shown)
    assert not re.search(r"<img|\[!\[", shown)
    assert "(docs/" not in shown


def test_the_sites_search_needs_no_other_host():
    """Material's offline plugin adds a script from another host, unless one of this name is there."""
    (script,) = re.findall(r"polyfills: \[(.*iframe-worker.*)\]", (ROOT / "mkdocs.yml").read_text())
    assert (ROOT / "docs" / script).exists()


def test_each_page_is_in_the_sites_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"- {page.relative_to(ROOT / 'docs')}\n" in menu, f"{page.name} is in no menu"


def test_every_law_in_the_semantics_names_its_test():
    from conformance.laws import LAWS

    page = (ROOT / "docs/semantics.md").read_text()
    named = [
        (int(number), law)
        for number, row in re.findall(r"^\| (\d+) \|(.*)", page, re.M)
        for law in re.findall(r"`laws\.(\w+)`", row)
    ]
    assert named == [(int(function.__doc__.split(".")[0]), law) for law, function in LAWS.items()]


def test_the_readme_names_the_commands_that_ci_runs():
    assert "make demo" in README
    assert "make test" in README
    assert "make test" in (ROOT / ".ci/run").read_text()
