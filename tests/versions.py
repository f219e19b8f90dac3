"""Builds an environment for each column of docs/versions.md, runs the laws in it, and writes what ran into the page.

python tests/versions.py                        every column whose Python is found
python tests/versions.py jax-oldest tf-newest   these columns; the page's other rows stay
python tests/versions.py quick                  what `make test` runs: some laws with the newest JAX, optax and Keras
"""

import datetime
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/versions.md"
# The laws at each API, and the quick start. The rest of the suite tests the pinned versions.
SUITE = ["tests/conformance/test_laws.py", "tests/conformance/test_quickstart.py"]
MARKS = "<!-- columns -->\n", "<!-- end of columns -->\n"
HEAD = "| column | backend | Python | versions | laws and quick start | when |\n| --- | --- | --- | --- | --- | --- |\n"


@dataclass(frozen=True)
class Column:
    """One environment.

    Attributes:
        python: the interpreter, such as "3.11".
        packages: what pip installs; a version that is not named is the newest that there is.
        backends: what pytest runs there, each in a process of its own.
    """

    python: str
    packages: tuple[str, ...]
    backends: tuple[str, ...]

    @property
    def frameworks(self) -> list[str]:
        """The packages whose versions the page shows."""
        return [re.split(r"[=\[]", package)[0] for package in self.packages]


TENSORFLOW = ("tensorflow", "tf1", "keras_tensorflow")
COLUMNS = {
    "torch-oldest": Column("3.11", ("torch==2.4.1", "keras==3.8.0", "numpy"), ("torch", "keras_torch")),
    "torch-3.12": Column("3.12", ("torch", "keras", "numpy"), ("torch", "keras_torch")),
    "torch-newest": Column("3.13", ("torch", "keras", "numpy"), ("torch", "keras_torch")),
    "jax-oldest": Column("3.11", ("jax==0.7.0", "optax==0.2.5", "orbax-checkpoint"), ("jax",)),
    # Keras 3.8 and 3.9 by themselves cannot train on JAX 0.7, whose `spmd_mode` they look for.
    "keras-jax-oldest": Column("3.11", ("jax==0.7.0", "optax==0.2.5", "keras==3.10.0"), ("keras_jax",)),
    "jax-3.12": Column("3.12", ("jax", "optax", "keras", "orbax-checkpoint"), ("jax", "keras_jax")),
    "jax-newest": Column("3.13", ("jax", "optax", "keras", "orbax-checkpoint"), ("jax", "keras_jax")),
    "tf-oldest": Column("3.11", ("tensorflow-cpu==2.16.2", "keras==3.8.0"), TENSORFLOW),
    "tf-3.12": Column("3.12", ("tensorflow-cpu", "keras"), TENSORFLOW),
    "tf-newest": Column("3.13", ("tensorflow-cpu", "keras"), TENSORFLOW),
}
# JAX 0.7 by itself cannot run a scan inside `ensure_compile_time_eval`, as this test does.
LEFT_OUT = {("jax-oldest", "jax"): "not (split and alone)"}
# Some laws of JAX's plain APIs, and of Keras's stream: what a minute and a half holds.
QUICK = {
    ("jax-newest", "jax"): "not products and not alone and not resume",
    ("jax-newest", "keras_jax"): "stream-one or stream-tail or stream-loss",
}


def interpreter(version: str) -> str | None:
    """The path of a Python: on the PATH, or pyenv's."""
    found = shutil.which(f"python{version}")
    if found and not subprocess.run([found, "-c", ""], capture_output=True).returncode:  # pyenv's shims may not run
        return found
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    several = sorted(root.glob(f"versions/{version}.*/bin/python"), key=lambda path: len(path.parts[-3]))
    return str(several[-1]) if several else None


def build(name: str, column: Column, python: str) -> Path:
    """The environment's Python. One that is there is brought up to date."""
    folder = ROOT / ".versions" / name
    if not (folder / "bin/python").exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--upgrade", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *column.packages, "pytest", "hypothesis"], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    return folder / "bin/python"


def run(python: Path, backend: str, selection: str | None) -> str:
    """What pytest's last line says. Other versions warn of other things, so warnings are no errors here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [python, "-m", "pytest", "-q", "-o", "filterwarnings=default", "--backend", backend, *SUITE]
    command += ["-k", selection] if selection else []
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines() or [done.stderr]
    print(*(line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1], sep="\n", flush=True)
    return re.sub(r", \d+ warnings?| in .*|=+ ?", "", lines[-1])


def versions(python: Path, column: Column) -> str:
    """The Python and the frameworks that an environment has, as two cells of the table."""
    code = (
        "import importlib.metadata as m, platform, sys;"
        "print(platform.python_version(), '|', ', '.join(p + ' ' + m.version(p) for p in sys.argv[1:]))"
    )
    return subprocess.run(
        [python, "-c", code, *column.frameworks], check=True, capture_output=True, text=True
    ).stdout.strip()


def write(rows: dict[tuple[str, str], str]) -> None:
    """Puts rows into the page's table, in the order of `COLUMNS`; those that did not run stay as they are."""
    text = PAGE.read_text()
    begin, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    old = dict(((r.split(" | ")[0][2:], r.split(" | ")[1]), r) for r in text[begin:end].splitlines()[2:] if r)
    table = {**old, **rows}
    order = [(name, backend) for name, column in COLUMNS.items() for backend in column.backends]
    lines = "".join(table[key] + "\n" for key in order if key in table)
    PAGE.write_text(text[:begin] + HEAD + lines + text[end:])


def main(asked: list[str]) -> int:
    quick = asked == ["quick"]
    asked = ["jax-newest"] if quick else asked
    if unknown := set(asked) - set(COLUMNS):
        sys.exit(f"unknown columns {sorted(unknown)}; there are {list(COLUMNS)}")
    failed = []
    for name in asked or COLUMNS:
        column = COLUMNS[name]
        python = interpreter(column.python)
        if python is None:
            print(f"== {name}: there is no Python {column.python} here", flush=True)
            continue
        built = build(name, column, python)
        for backend in column.backends:
            print(f"== {name} {backend}", flush=True)
            result = run(built, backend, (QUICK if quick else LEFT_OUT).get((name, backend)))
            row = f"| {name} | {backend} | {versions(built, column)} | {result} | {datetime.date.today()} |"
            if quick:
                print(row)
            else:
                write({(name, backend): row})
            failed += [] if re.fullmatch(r"\d+ passed(, \d+ (skipped|deselected))*", result) else [f"{name} {backend}"]
    print("failed: " + ", ".join(failed) if failed else "everything passed", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
