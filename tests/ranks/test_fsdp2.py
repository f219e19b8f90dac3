"""Several ranks under fully_shard against one process with the whole batch; and the private names that this needs."""

import pytest
import torch

import bigbatch.torch as bb
from conformance.ranks_pool import pool
from ranks import in_rank
from ranks.test_ddp import alike, close, deal, windows_of

KINDS = [
    (2, "fsdp window"), (2, "fsdp micro_batch"), (4, "fsdp window"), (4, "hsdp window"), (4, "hsdp micro_batch"),
]  # fmt: skip


@pytest.mark.parametrize(("size", "kind"), KINDS)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_stream_equals_one_process(size, kind, clip_norm):
    dealt = deal((5,) * size, seed=5)  # two windows and a flush
    windows = windows_of(dealt, 2)
    wanted, seen = in_rank.one_process(windows, in_rank.adamw, clip_norm)
    results = pool(size).run(in_rank.stream, dealt, in_rank.adamw, 2, {"kind": kind, "clip_norm": clip_norm})
    close(alike([parameters for parameters, _ in results]), wanted)
    for _, updates in results:
        for update, (items, loss, norm), window in zip(updates, seen, windows, strict=True):
            assert (update.items, update.micro_batches) == (items, len(window))
            assert (update.loss, update.grad_norm) == pytest.approx((loss, norm), rel=1e-12)


UNEVEN = {2: (5, 2), 4: (3, 6, 1, 4)}


@pytest.mark.parametrize(("size", "kind"), KINDS)
@pytest.mark.parametrize("every", [2, 4])
def test_join_is_exact_where_ranks_have_different_numbers_of_micro_batches(size, kind, every):
    dealt = deal(UNEVEN[size], seed=7)
    windows = windows_of(dealt, every)
    wanted, seen = in_rank.one_process(windows, in_rank.adamw)
    results = pool(size).run(in_rank.stream, dealt, in_rank.adamw, every, {"kind": kind, "join": True})
    close(alike([parameters for parameters, _ in results]), wanted)
    for _, updates in results:
        for update, (items, loss, _), window in zip(updates, seen, windows, strict=True):
            assert (update.items, update.micro_batches) == (items, len(window))
            assert update.loss == pytest.approx(loss, rel=1e-12)


def test_join_needs_a_micro_batch_on_every_rank():
    options = {"kind": "fsdp window", "join": True}
    for outcome in pool(2).outcomes(in_rank.stream, deal((2, 0)), in_rank.sgd, 2, options):
        assert type(outcome) is ValueError
        assert "1 of 2 ranks with a micro-batch" in str(outcome)


@pytest.mark.parametrize(("size", "kind"), KINDS)
def test_items_are_counted_over_all_ranks(size, kind):
    dealt, plan = deal((6,) * size, seed=6), 20 * size
    windows, held = [[]], 0
    for several in zip(*dealt, strict=True):
        windows[-1] += several
        held += sum(map(in_rank.tokens_in, several))
        if held >= plan:
            windows.append([])
            held = 0
    wanted, _ = in_rank.one_process([w for w in windows if w], in_rank.sgd)
    results = pool(size).run(in_rank.stream, dealt, in_rank.sgd, bb.items(plan), {"kind": kind})
    close(alike([parameters for parameters, _ in results]), wanted)


@pytest.mark.parametrize(("size", "kind"), KINDS)
@pytest.mark.parametrize("micro_batch", [1, 3, bb.tokens(12, lengths=in_rank.lengths_of, multiple_of=1)], ids=str)
def test_split_equals_one_process_with_parts_of_any_length(size, kind, micro_batch):
    # The shortest part has one example, and as many forwards as the longest.
    rows = (5, 1, 7, 2)
    dealt = [[torch.cat(mine)[: rows[rank]] for _ in range(2)] for rank, mine in enumerate(deal((7,) * size, seed=7))]
    wanted, seen = in_rank.one_process([[mine[k] for mine in dealt] for k in range(2)], in_rank.sgd)
    losses = torch.tensor([loss for _, loss, _ in seen], dtype=torch.float64)
    close(alike(pool(size).run(in_rank.split, dealt, in_rank.sgd, micro_batch, kind)), [*wanted, losses])


def test_split_refuses_an_empty_part_on_every_rank():
    tokens = in_rank.texts(1, seed=0)[0]
    for outcome in pool(2).outcomes(in_rank.split, [[tokens], [tokens[:0]]], in_rank.sgd, 1, "fsdp window"):
        assert type(outcome) is ValueError
        assert "needs every rank" in str(outcome)


@pytest.mark.parametrize("kind", ["fsdp window", "fsdp micro_batch"])
def test_all_ranks_skip_a_window_that_is_not_finite_on_one(kind):
    dealt = deal((6, 6), seed=4)
    windows = windows_of(dealt, 2)
    wanted, _ = in_rank.one_process([windows[0], windows[2]], in_rank.sgd)
    results = pool(2).run(in_rank.poisoned, dealt, 1, "skip", kind)
    for updates, _ in results:
        assert [bool(u.skipped) for u in updates] == [False, True, False]
    close(alike([seen[-1] for _, seen in results]), wanted)


@pytest.mark.parametrize(("size", "kind"), KINDS)
def test_an_error_in_the_backward_leaves_the_next_window_clean(size, kind):
    dealt = deal((6,) * size, seed=8)
    wanted, _ = in_rank.one_process(windows_of([mine[2:] for mine in dealt], 2), in_rank.sgd)
    close(alike(pool(size).run(in_rank.error_everywhere, dealt, kind)), wanted)


def counted(kind, size=2, flush=False, every=4):
    sent = pool(size).run(in_rank.wire, every, 1 << 25, kind, flush)[0]
    return [kind for kind, _ in sent]


@pytest.mark.parametrize("flush", [False, True])
def test_one_reduction_a_group_and_window_or_micro_batch(flush):
    groups, every = 3, 4
    assert counted("fsdp window", flush=flush).count("_reduce_scatter_base_") == groups
    assert counted("fsdp micro_batch", flush=flush).count("_reduce_scatter_base_") == groups * every
    small = 1 + 1  # the numbers, and the norm of the shards
    assert counted("fsdp window", flush=flush).count("allreduce_") <= small
    hybrid = counted("hsdp micro_batch", 4, flush)
    # Replicated once a window, whether it closes with its last micro-batch or early.
    assert hybrid.count("allreduce_") <= groups + small + 1
    assert hybrid.count("_reduce_scatter_base_") == groups * (every + flush)


@pytest.mark.parametrize("kind", ["fsdp window", "fsdp micro_batch"])
def test_bfloat16_shards_add_up_in_float32(kind):
    both = pool(2).run(in_rank.half, 32, kind)
    model = in_rank.language_model(torch.bfloat16)
    sums, items = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()], 0
    for rank in range(2):
        for tokens in in_rank.texts(32, seed=rank):
            model.zero_grad()
            in_rank.loss_of(model, tokens).backward()
            items += in_rank.tokens_in(tokens)
            for total, p in zip(sums, model.parameters(), strict=True):
                total += p.grad.double() * in_rank.tokens_in(tokens)
    for got, total in zip(alike(both), sums, strict=True):
        # FSDP gives a bfloat16 gradient each time it reduces: at most eight bits' rounding of each, and one more.
        assert (got.double() - total / items).norm() <= (total / items).norm() * 2.0**-7


@pytest.mark.parametrize(("size", "kind"), [(2, "ddp"), *KINDS])
@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_saved_and_loaded_inside_a_window_bit_for_bit(size, kind, place):
    for straight, resumed in pool(size).run(in_rank.resumed, deal((7,) * size, seed=9), place, kind):
        assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize(("size", "kind"), [(2, "ddp"), *KINDS])
def test_a_loaded_window_is_flushed_before_any_forward(size, kind):
    dealt = deal((2,) * size, seed=10)
    wanted, _ = in_rank.one_process(windows_of(dealt, 3), in_rank.sgd)
    close(alike(pool(size).run(in_rank.flushed_at_once, dealt, kind)), wanted)


@pytest.mark.parametrize("kind", ["ddp", "fsdp window", "fsdp micro_batch"])
def test_torch_distributed_checkpoint_inside_a_window_and_on_other_ranks_at_its_edge(kind, tmp_path):
    dealt = deal((6, 6, 6, 6), seed=11)
    save = in_rank.distributed_checkpoint
    straight = pool(2).run(save, str(tmp_path / "straight"), kind, dealt, 0, 6)
    pool(2).run(save, str(tmp_path / "inside"), kind, dealt, 0, 3)
    resumed = pool(2).run(save, str(tmp_path / "inside"), kind, dealt, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(alike(straight), alike(resumed), strict=True))

    pool(2).run(save, str(tmp_path / "edge"), kind, dealt, 0, 2)
    more = pool(4).run(save, str(tmp_path / "edge"), kind, dealt, 2, 6)
    windows = [windows_of(dealt[:2], 2)[0], *windows_of(dealt, 2)[1:]]
    close(alike(more), in_rank.one_process(windows, in_rank.adamw)[0])


REFUSED = {
    "partly": "fully_shard must own every parameter. Received: 0.weight, which is not sharded.",
    "narrow": "fully_shard would add up gradients in torch.bfloat16.",
    "scaler": "scaler does not know shards.",
    "noise": "The noise scale needs a micro-batch's whole gradient. Received: noise=True, and shards.",
    "sync": "sync must be one of 'window', 'micro_batch'. Received: sync='never' (str).",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reduced_is_refused(name):
    for outcome in pool(2).outcomes(in_rank.refused_shards, name):
        assert type(outcome) is ValueError
        assert REFUSED[name] in str(outcome)
