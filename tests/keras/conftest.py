"""Keras takes its backend from the environment when it is imported, so before any test module is."""

import os

import pytest

# What they look at is what XLA makes of a program.
OPTIMIZED = {"test_memory", "test_speed"}


def pytest_pycollect_makemodule(module_path, parent):
    os.environ["KERAS_BACKEND"] = parent.config.getoption("backend").removeprefix("keras_")


@pytest.fixture(autouse=True)
def _compiled_quickly(request):
    """On JAX compiling is most of this room's time. What else is tested here is as true of unoptimized programs.

    The laws run on optimized ones.
    """
    if os.environ["KERAS_BACKEND"] != "jax":
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", request.path.stem not in OPTIMIZED)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
