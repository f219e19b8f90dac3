"""The code of the page on trainers runs."""

import warnings
from pathlib import Path

import pytest

from documentation import run_blocks

PAGE = Path(__file__).parent.parent.parent / "docs/trainers.md"


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_page_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_blocks(PAGE) >= 3
