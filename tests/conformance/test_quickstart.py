"""The quick start's tab for the backend runs as printed."""

from pathlib import Path

from documentation import run_blocks

TABS = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}


def test_the_tab_runs(request):
    tab = TABS.get(request.config.getoption("backend"), "Keras")
    assert run_blocks(Path(__file__).parents[2] / "docs/quickstart.md", tab=tab) == 1
