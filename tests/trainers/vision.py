"""Imports lightning as if torchvision were not installed, where that cannot be imported.

torchvision's wheels for a GPU fail beside a PyTorch for the CPU, torchmetrics imports what is installed, and nothing
here needs it.
"""

import importlib
import sys
from unittest import mock

from lightning_utilities.core.imports import RequirementCache

_available = RequirementCache.__bool__


def _but_torchvision(cache):
    return "torchvision" not in str(cache.requirement) and _available(cache)


try:
    importlib.import_module("torchvision")
except (ImportError, RuntimeError):
    sys.modules["torchvision"] = None
    with mock.patch.object(RequirementCache, "__bool__", _but_torchvision):
        importlib.import_module("lightning.pytorch")


def imported():
    """For a rank, which has imported this module to find the function."""
    importlib.import_module("lightning.pytorch")
