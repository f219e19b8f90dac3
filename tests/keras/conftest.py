"""Keras takes its backend from the environment when it is imported, so before any test module is."""

import os

import pytest

# Many programs, of which only numbers are looked at.
MANY = {"test_checkpoint", "test_fit", "test_loss_over_batch", "test_optimizers"}


def pytest_pycollect_makemodule(module_path, parent):
    os.environ["KERAS_BACKEND"] = parent.config.getoption("backend").removeprefix("keras_")


@pytest.fixture(autouse=True)
def _compiled_quickly(request):
    """On JAX compiling is most of the time, and these tests are as true of programs that are not optimized."""
    if os.environ["KERAS_BACKEND"] != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", request.path.stem in MANY)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
