"""The suite itself: a right adapter passes every law, and each wrong one fails the law named for it."""

import pytest

from conformance.adapters.reference import Reference
from conformance.adapters.wrong import WRONG, adapter
from conformance.laws import LAWS, LawBroken


@pytest.mark.parametrize("law", LAWS)
def test_the_reference_keeps_every_law(law):
    LAWS[law](Reference())


def test_every_law_has_a_wrong_adapter():
    assert {law.__doc__.split(".")[0] for law in LAWS.values()} == {str(k + 1) for k in range(16)}
    assert WRONG.keys() == LAWS.keys()


@pytest.mark.parametrize(
    ("law", "wrong"),
    [(law, wrong) for law, several in WRONG.items() for wrong in several],
    ids=lambda value: value if isinstance(value, str) else adapter(value).name,
)
def test_a_wrong_adapter_fails_its_law(law, wrong):
    with pytest.raises(LawBroken):
        LAWS[law](adapter(wrong))
