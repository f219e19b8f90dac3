"""Keras takes its backend from the environment when it is imported, so before any test module is."""

import os


def pytest_pycollect_makemodule(module_path, parent):
    os.environ["KERAS_BACKEND"] = parent.config.getoption("backend").removeprefix("keras_")
