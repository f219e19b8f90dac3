"""Coupled losses over the examples of several ranks, each in pieces, against one process with the whole batch."""

import pytest
import torch

from conformance.ranks_pool import pool
from ranks import in_chunked, in_rank, test_ddp

ROWS = {2: (5, 3), 4: (5, 3, 1, 4)}  # examples a rank


def dealt(size, count):
    """To each rank its batches, and what they hold together."""
    each = [[in_chunked.pairs(rows, 10 * k + rank) for k in range(count)] for rank, rows in enumerate(ROWS[size])]
    return each, [torch.cat(parts, 1) for parts in zip(*each, strict=True)]


def close(got, right):
    for g, r in zip(got, right, strict=True):
        torch.testing.assert_close(g, r, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("loss", list(in_chunked.LOSSES))
def test_ranks_of_unequal_size_give_the_whole_batchs_updates(size, loss):
    each, whole = dealt(size, 4)
    right = in_chunked.one_process([whole[:2], whole[2:]], loss)
    results = pool(size).run(in_chunked.chunked, loss, 2, loss == "siglip", each=each)
    for parameters, updates in results:
        assert updates == 2
        close(parameters, right)
        assert all(torch.equal(a, b) for a, b in zip(parameters, results[0][0], strict=True))


def test_rows_are_gathered_in_the_order_of_ranks_with_the_sum_of_all_ranks_gradients():
    parts, labels = [torch.randn(n, 3, dtype=torch.float64) for n in ROWS[4]], [torch.arange(n) for n in ROWS[4]]
    results = pool(4).run(_gathered, each=list(zip(parts, labels, strict=True)))
    for part, (rows, grad, gathered_labels) in zip(parts, results, strict=True):
        assert torch.equal(rows, torch.cat(parts))
        assert torch.equal(gathered_labels, torch.cat(labels))
        close([grad], [2 * part * (1 + 2 + 3 + 4)])


def test_gathered_rows_of_before_are_not_counted_for_a_rank_without_micro_batches():
    """Rank 2 has none in the first window, and what it has differentiated is no part of that."""
    parts, labels = [torch.randn(n, 3, dtype=torch.float64) for n in ROWS[4]], [torch.arange(n) for n in ROWS[4]]
    pool(4).run(_gathered, each=list(zip(parts, labels, strict=True)))
    held = test_ddp.deal(test_ddp.UNEVEN[4])
    wanted, _ = in_rank.one_process(test_ddp.windows_of(held, 3), in_rank.adamw)
    results = pool(4).run(in_rank.stream, held, in_rank.adamw, 3, {})
    close(test_ddp.alike([parameters for parameters, _ in results]), wanted)


def _gathered(given):
    return in_chunked.gradients_of_gathered(*given)


def test_items_that_would_weigh_the_ranks_differently_are_refused_and_the_next_window_is_exact():
    each, whole = dealt(2, 1)
    outcomes = pool(2).outcomes(_weighed, each=each)
    right = in_chunked.one_process([whole], "info_nce")
    for said, parameters in outcomes:
        assert "The ranks disagree on items, where losses are of gathered rows. Received: 5, after 5" in said
        close(parameters, right)


def _weighed(mine):
    ddp, said = in_chunked.DistributedDataParallel(in_chunked.Towers()), ""
    encode = in_chunked.bb.chunked(ddp, micro_batch=2)
    acc = in_chunked.bb.Accumulator(in_chunked.sgd(ddp), every=1, model=ddp)
    for items in (len(mine[0][0]), 1):
        a, b = (in_chunked.bb.gathered(rows) for rows in encode(*mine[0]))
        try:
            acc.backward(in_chunked.info_nce(a, b, ddp.module.scale), items=items)
        except ValueError as error:
            said = str(error)
    return said, [p.detach() for p in ddp.parameters()]


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("fully_shard", ValueError, "A fully_shard model cannot be chunked."),
        ("shards inside", ValueError, "A fully_shard model cannot be chunked."),
        ("nobody reduces", ValueError, "Pass the model to bb.Accumulator"),
        ("nobody reduces inside", ValueError, "Pass the model to bb.Accumulator"),
        ("shapes", ValueError, r"The ranks disagree on what is gathered. Received: rows of shape (3,)"),
        ("dtypes", ValueError, "The ranks disagree on what is gathered."),
        ("scalar", TypeError, "gathered takes a tensor with rows. Received: x=shape ()"),
    ],
)
def test_what_is_refused(name, error, text):
    for outcome in pool(2).outcomes(in_chunked.refused, name):
        assert isinstance(outcome, error)
        assert text in str(outcome)


def test_without_gradients_nothing_has_to_be_reduced():
    for got in pool(2).run(in_chunked.without_gradients):
        with torch.no_grad():
            close(got, in_chunked.Towers()(*in_chunked.pairs(5, 0)))
