"""`--backend NAME` runs the laws and the room's own tests for one framework; without it, what needs no framework.

One framework a process: TensorFlow 1 flips global state, and Keras freezes its backend at import. A backend that is
asked for and missing fails. `--device cuda` makes PyTorch's tensors there, and runs what needs a GPU (CI has none).
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

BACKENDS = sorted(
    path.stem for path in (Path(__file__).parent / "conformance/adapters").glob("[a-z]*.py")
    if path.stem not in ("reference", "wrong")
)  # fmt: skip
BACKENDS.append("trainers")  # the libraries of loops that stand on PyTorch; the laws run on their parts


def pytest_addoption(parser):
    parser.addoption("--backend", choices=BACKENDS, help="the framework under test")
    parser.addoption("--hide-fused", action="store_true", help="as if src/bigbatch/fused had been deleted")
    parser.addoption("--device", help="where PyTorch makes its tensors")


def pytest_configure(config):
    for name in ("torch", "jax", "keras", "tensorflow"):
        if (spec := importlib.util.find_spec(name)) is not None and spec.origin is None:
            sys.modules[name] = None  # the tests' folder of that name, which is no framework that is missing
    if config.getoption("hide_fused"):
        sys.modules["bigbatch.fused"] = None  # an import of it, or of what lies in it, is a ModuleNotFoundError
    if device := config.getoption("device"):
        importlib.import_module("torch").set_default_device(device)


def pytest_ignore_collect(collection_path, config):
    """Only the rooms of the backend, and of no backend what needs none."""
    backend = config.getoption("backend")
    if collection_path.name == "test_gpu.py" and config.getoption("device") is None:
        return True
    parts = collection_path.relative_to(Path(__file__).parent).parts
    needs_one = parts[:1] == ("conformance",) and parts[-1] in NEED_A_BACKEND
    room = parts[0] if parts and parts[0] in ROOMS else None
    if parts[-1] in ("test_adversary.py", "test_quickstart.py") and backend in ("tf1", "ranks"):
        return True  # these have tests of their own
    if backend is None:
        return True if needs_one or room else None
    if backend == "trainers" and needs_one:
        return True
    return True if not needs_one and room != ROOM_OF.get(backend, backend) and collection_path.is_file() else None


NEED_A_BACKEND = ("test_laws.py", "test_properties.py", "test_adversary.py", "test_quickstart.py")
ROOM_OF = {"keras_torch": "keras", "keras_jax": "keras", "keras_tensorflow": "keras"}
ROOMS = {ROOM_OF.get(backend, backend) for backend in BACKENDS}


def pytest_generate_tests(metafunc):
    if "adapter" in metafunc.fixturenames:
        adapters = importlib.import_module(f"conformance.adapters.{metafunc.config.getoption('backend')}").ADAPTERS
        metafunc.parametrize("adapter", adapters, ids=lambda adapter: adapter.name)


@pytest.fixture(autouse=True)
def _no_figures_on_screen(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
