"""Every slot-making optimizer works inside the conditional, on dense and on sparse gradients."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("optimizers", Path(__file__).with_name("optimizers.py"))
optimizers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(optimizers)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_two_windows_are_two_big_batches(name):
    optimizers.check(name)
