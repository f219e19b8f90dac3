"""Every law on every door of the backend."""

import pytest

from conformance.laws import LAWS


@pytest.mark.parametrize("law", LAWS)
def test_law(law, adapter):
    LAWS[law](adapter)
