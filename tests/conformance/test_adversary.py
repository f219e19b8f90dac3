"""Random models, windows and foreign acts: the full batch's update, or an error and then an exact window."""

import adversary

EXAMPLES = {"torch": 300, "jax": 60, "tensorflow": 60}


def test_there_is_no_third_outcome(request):
    backend = request.config.getoption("backend")
    # The same examples each time, so that a red run says what a change did; `python tests/adversary.py` draws others.
    assert adversary.search(backend, EXAMPLES.get(backend, 40), number=16)
