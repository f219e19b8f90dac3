"""When Python exits, it waits for gloo's threads, which let go of what they were given a little after a collective."""

import threading
import time

import pytest
import torch

from bigbatch.torch import collectives
from conformance.ranks_pool import pool
from ranks import in_rank


def test_python_waits_for_what_is_held_outside_of_it():
    held = []
    # A view holds its base from C++, as gloo does.
    collectives.checked_collective(lambda x: held.append(x.view(-1)), torch.zeros(3))
    assert len(collectives._SENT) == 1
    threading.Timer(0.5, held.clear).start()
    started = time.perf_counter()
    collectives._wait_for_gloo(seconds=30)
    assert len(collectives._SENT) == 0
    assert time.perf_counter() - started > 0.3


def test_a_rank_that_was_lost_is_not_waited_for():
    def lost(tensor):
        raise RuntimeError("Connection reset by peer")

    sent = torch.zeros(3)  # as a traceback has it
    with pytest.raises(RuntimeError, match="rank"):
        collectives.checked_collective(lost, sent)
    assert len(collectives._SENT) == 0


def test_nothing_that_stays_was_handed_to_gloo():
    assert pool(2).run(in_rank.sent_and_gone) == [True, True]
