"""Makes a release and tries it as a stranger would; it stops before anything is uploaded.

python tests/release.py                 the distributions, and each extra in an empty environment
python tests/release.py jax keras-jax   only these extras
python tests/release.py check           the distributions alone, as CI does
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# For each extra what has to run with it, a tab of the quick start or an example, and Keras's backend.
EXTRAS = {
    "torch": ("PyTorch", None),
    "jax": ("JAX", None),
    "tensorflow": ("TensorFlow", None),
    "tensorflow-cpu": ("TensorFlow", None),
    "keras-torch": ("Keras", "torch"),
    "keras-jax": ("Keras", "jax"),
    "keras-tensorflow": ("Keras", "tensorflow"),
    "transformers": ("transformers_trainer.py", None),
    "lightning": ("lightning_accumulate.py", None),
    "accelerate": ("accelerate_accumulate.py", None),
}
TRAIN = """
import sys
from pathlib import Path
import bigbatch
root = Path(sys.argv[1])
assert root not in Path(bigbatch.__file__).parents, bigbatch.__file__
sys.path.append(str(root / "tests"))
from documentation import run_blocks
sys.path.pop()  # or tests/jax would pass for a JAX that is not there
assert run_blocks(root / "docs/quickstart.md", tab=sys.argv[2]) == 1
"""


def run(*command: object, **options: object) -> None:
    """One command; it ends the release if it fails."""
    print("$", *(part if "\n" not in str(part) else "…" for part in command), flush=True)
    if subprocess.run([str(part) for part in command], cwd=ROOT, **options).returncode:
        sys.exit("the release failed here")


def check_contents(wheel: Path, sdist: Path) -> None:
    """The wheel has the package and nothing else; the sdist has neither pictures nor what is for CI."""
    source = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/bigbatch").rglob("*.py")}
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    if names != source | {"bigbatch/py.typed"}:
        sys.exit(f"the wheel's contents are not the package's: {sorted(names ^ (source | {'bigbatch/py.typed'}))}")
    with tarfile.open(sdist) as file:
        unwanted = [name for name in file.getnames() if name.endswith(".png") or "/.ci/" in name or "/.github/" in name]
    if unwanted:
        sys.exit(f"the sdist has what does not belong there: {unwanted}")


def train(extra: str, wheel: Path) -> None:
    """Installs the wheel with an extra in an empty environment, and runs the quick start or an example there."""
    what, backend = EXTRAS[extra]
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        python = Path(folder, "bin/python")
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt",
            f"{wheel}[{extra}]")  # fmt: skip
        environment = {**os.environ, **({"KERAS_BACKEND": backend} if backend else {}), "TF_CPP_MIN_LOG_LEVEL": "2"}
        environment.pop("PYTHONPATH", None)
        if what.endswith(".py"):
            run(python, ROOT / "examples" / what, env=environment)
        else:
            run(python, "-c", TRAIN, ROOT, what, env=environment)


def main(asked: list[str]) -> None:
    alone = asked == ["check"]
    asked = [] if alone else asked
    if unknown := set(asked) - set(EXTRAS):
        sys.exit(f"unknown extras {sorted(unknown)}; there are {list(EXTRAS)}")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", "dist", ".")
    run(sys.executable, "-m", "twine", "check", "--strict", *(ROOT / "dist").iterdir())
    (wheel,), (sdist,) = (ROOT / "dist").glob("*.whl"), (ROOT / "dist").glob("*.tar.gz")
    check_contents(wheel, sdist)
    if alone:
        return
    for extra in asked or EXTRAS:
        train(extra, wheel)
    print(f"ready: {wheel.name} and {sdist.name} are in dist/. Upload them with: python -m twine upload dist/*")


if __name__ == "__main__":
    main(sys.argv[1:])
