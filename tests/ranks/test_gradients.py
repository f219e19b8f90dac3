"""`bb.Gradients` on two ranks, in a loop that clips and steps itself, against one process with the whole batch."""

import pytest

from conformance.ranks_pool import pool
from ranks import in_rank
from ranks.test_ddp import alike, close, deal, windows_of


@pytest.mark.parametrize("closed_by", ["count", "caller"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp window", "fsdp micro_batch"])
def test_the_mean_of_all_ranks_lies_in_grad(kind, closed_by):
    # Under fully_shard every forward needs all ranks; elsewhere one may end before the other.
    dealt = deal((7, 4) if kind == "ddp" else (5, 5), seed=21)
    windows = windows_of(dealt, 2)
    wanted, seen = in_rank.one_process(windows, in_rank.adamw, 0.1)
    results = pool(2).run(in_rank.trainer, dealt, 2, closed_by, kind)
    close(alike([parameters for parameters, _ in results]), wanted)
    for _, updates in results:
        for update, (items, loss, norm), window in zip(updates, seen, windows, strict=True):
            assert (update.items, update.micro_batches) == (items, len(window))
            assert (update.loss, update.grad_norm) == pytest.approx((loss, norm), rel=1e-12)


def test_ranks_that_disagree_are_told_so():
    for outcome in pool(2).outcomes(different_every):
        assert type(outcome) is ValueError
        assert "The ranks disagree on every. Received: 2 (rank 0), 3 (rank 1)." in str(outcome)


def different_every():
    import torch.distributed as dist

    model, _ = in_rank.wrapped("ddp")
    in_rank.bb.Gradients(model.parameters(), 2 + dist.get_rank(), model=model)
