"""Several ranks under DistributedDataParallel against one process with the whole batch."""

import pytest
import torch

import bigbatch.torch as bb
from bigbatch.noise import Noise
from conformance.ranks_pool import Pool, pool
from ranks import in_rank

SIZES = [2, 4]


def close(got, wanted, relative=1e-12):
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=relative, atol=relative)


def alike(results):
    """The ranks' parameters are the same bits."""
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


def deal(counts, seed=0):
    """To each rank its own number of ragged micro-batches."""
    return [in_rank.texts(count, seed=100 * seed + rank) for rank, count in enumerate(counts)]


def windows_of(dealt, every):
    """What the ranks' n-th windows hold together; the last may be short, and a rank that ran out brings nothing."""
    return [[t for mine in dealt for t in mine[s : s + every]] for s in range(0, max(map(len, dealt)), every)]


UNEVEN = {2: (7, 4), 4: (7, 5, 0, 4)}  # micro-batches a rank; the third of four has none at all


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_stream_equals_one_process(size, clip_norm):
    dealt = deal(UNEVEN[size])
    windows = windows_of(dealt, 3)
    wanted, seen = in_rank.one_process(windows, in_rank.adamw, clip_norm)
    results = pool(size).run(in_rank.stream, dealt, in_rank.adamw, 3, {"clip_norm": clip_norm})
    close(alike([parameters for parameters, _ in results]), wanted)
    for rank, (_, updates) in enumerate(results):
        # A rank that ran out joins the others' windows in its flush, which returns the last Update.
        full = len(dealt[rank]) // 3
        assert [u.index for u in updates] == [*range(full), len(windows) - 1]
        for update in updates:
            items, loss, norm = seen[update.index]
            assert (update.items, update.micro_batches) == (items, len(windows[update.index]))
            assert (update.loss, update.grad_norm) == pytest.approx((loss, norm), rel=1e-12)


@pytest.mark.parametrize("kind", ["ddp", "fsdp window", "fsdp micro_batch"])
def test_fused_weight_gradients_are_reduced_too(kind):
    dealt = deal((4, 4))
    wanted, _ = in_rank.one_process(windows_of(dealt, 2), in_rank.sgd)
    results = pool(2).run(in_rank.stream, dealt, in_rank.sgd, 2, {"kind": kind, "fused_from": 1})
    close(alike([parameters for parameters, _ in results]), wanted)


@pytest.mark.parametrize("size", SIZES)
def test_the_noise_scale_is_made_of_every_ranks_micro_batches(size):
    dealt = deal(UNEVEN[size], seed=12)
    results = pool(size).run(in_rank.stream, dealt, in_rank.frozen, 3, {"noise": 1})
    model = in_rank.language_model()
    for _, updates in results:
        for update in updates:
            window = windows_of(dealt, 3)[update.index]
            counts = [in_rank.tokens_in(t) for t in window]
            found = [torch.autograd.grad(in_rank.loss_of(model, t), list(model.parameters())) for t in window]
            flat = [torch.cat([g.flatten() for g in several]) for several in found]
            mean = sum(n * g for n, g in zip(counts, flat, strict=True)) / sum(counts)
            squares = sum(n * float(g @ g) for n, g in zip(counts, flat, strict=True))
            wanted = Noise.of(len(window), sum(counts), squares, float(mean @ mean))
            assert (update.noise.micro_batches, update.noise.items) == (wanted.micro_batches, wanted.items)
            assert update.noise.trace == pytest.approx(wanted.trace, rel=1e-9, nan_ok=True)
            assert update.noise.squared_norm == pytest.approx(wanted.squared_norm, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("size", SIZES)
def test_items_are_counted_over_all_ranks_which_close_together(size):
    dealt, plan = deal(UNEVEN[size], seed=1), 40
    windows, held = [[]], 0
    for i in range(max(map(len, dealt))):  # the ranks' i-th micro-batches, then a look at the sum
        several = [mine[i] for mine in dealt if i < len(mine)]
        windows[-1] += several
        held += sum(map(in_rank.tokens_in, several))
        if held >= plan:
            windows.append([])
            held = 0
    windows = [w for w in windows if w]
    assert len(windows) > 1
    wanted, seen = in_rank.one_process(windows, in_rank.sgd)
    results = pool(size).run(in_rank.stream, dealt, in_rank.sgd, bb.items(plan))
    close(alike([parameters for parameters, _ in results]), wanted)
    longest = max(results, key=lambda result: len(result[1]))[1]
    assert [u.items for u in longest] == [items for items, _, _ in seen]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("micro_batch", [1, 2, 100, bb.tokens(12, lengths=in_rank.lengths_of, multiple_of=1)], ids=str)
def test_split_equals_one_process(size, micro_batch):
    nothing = in_rank.texts(1, seed=0)[0][:0]
    held = [torch.cat(mine) if mine else nothing for mine in deal(UNEVEN[size])]
    dealt = [[mine, mine.flip(0)[: size - rank]] for rank, mine in enumerate(held)]
    windows = [[mine[k] for mine in dealt] for k in range(2)]
    wanted, seen = in_rank.one_process(windows, in_rank.sgd)
    losses = torch.tensor([loss for _, loss, _ in seen], dtype=torch.float64)
    close(alike(pool(size).run(in_rank.split, dealt, in_rank.sgd, micro_batch)), [*wanted, losses])


@pytest.mark.parametrize("where", [0, 1, -1])
@pytest.mark.parametrize("size", SIZES)
def test_each_rank_finds_its_micro_batch_and_an_out_of_memory_is_its_own_affair(size, where):
    rows = (7, 5, 0, 3)
    dealt = [torch.cat(mine)[: rows[rank]] for rank, mine in enumerate(deal((7,) * size, seed=13))]
    wanted, seen = in_rank.one_process([dealt], in_rank.sgd)
    losses = torch.tensor(seen[0][1], dtype=torch.float64)
    results = pool(size).run(in_rank.automatic, dealt, where)
    close(alike([found for found, _ in results]), [*wanted, losses])
    for rank, (_, sizes) in enumerate(results):
        whole = [rows[rank]] if rows[rank] else []
        assert sizes == {0: [7, 4, 2, 2, 2, 1], 1: [5, 3, 2, 2, 1]}[rank] if rank == where else sizes == whole


def test_split_adds_to_grad_and_lets_the_model_reduce_again():
    held = [in_rank.texts(1, seed=rank)[0] for rank in range(2)]
    items = [in_rank.tokens_in(mine) for mine in held]
    for ours, its_own in pool(2).run(in_rank.twice, held):
        close(ours, [g * 2 * 2 / sum(items) for g in its_own])  # its own mean divides by the two ranks


def test_a_bad_micro_batch_on_one_rank_is_missing_and_nothing_else():
    dealt = deal((5, 5), seed=2)
    broken = [dealt[0], [*dealt[1][:2], None, *dealt[1][2:]]]
    wanted, _ = in_rank.one_process(windows_of(dealt, 2), in_rank.sgd)
    results = pool(2).run(in_rank.stream, broken, in_rank.sgd, 2)
    close(alike([parameters for parameters, _ in results]), wanted)


def test_an_error_in_autograd_drops_one_ranks_part_and_the_ranks_stay_together():
    dealt = deal((6, 6), seed=3)
    wanted, _ = in_rank.one_process(windows_of([dealt[0], dealt[1][2:]], 3), in_rank.sgd)
    close(alike(pool(2).run(in_rank.autograd_error, dealt, 1)), wanted)


@pytest.mark.parametrize("where", [0, 1])
def test_all_ranks_skip_a_window_that_is_not_finite_on_one(where):
    dealt = deal((6, 6), seed=4)
    windows = windows_of(dealt, 2)
    wanted, _ = in_rank.one_process([windows[0], windows[2]], in_rank.sgd)
    results = pool(2).run(in_rank.poisoned, dealt, where, "skip")
    for updates, seen in results:
        assert [bool(u.skipped) for u in updates] == [False, True, False]
        assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    close(alike([seen[-1] for _, seen in results]), wanted)
    for updates, _ in pool(2).run(in_rank.poisoned, dealt, where, "raise"):
        assert [isinstance(u, str) for u in updates] == [False, True, False]
        assert updates[1].startswith("the window is not finite: loss nan")


def test_an_overflow_on_one_rank_lowers_the_scale_on_all():
    (skipped, scale), (other, other_scale) = pool(2).run(in_rank.overflowing, 1)
    assert skipped == other
    assert [bool(s) for s in skipped] == [False, True, False]
    assert scale == other_scale == 512.0


def test_bfloat16_gradients_add_up_in_float32_across_ranks():
    (many, others) = pool(2).run(in_rank.half, 32)
    assert all(torch.equal(a, b) for a, b in zip(many, others, strict=True))
    model = in_rank.language_model(torch.bfloat16)
    sums, items = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()], 0
    for rank in range(2):
        for tokens in in_rank.texts(32, seed=rank):
            model.zero_grad()
            in_rank.loss_of(model, tokens).backward()
            items += in_rank.tokens_in(tokens)
            for total, p in zip(sums, model.parameters(), strict=True):
                total += p.grad.double() * in_rank.tokens_in(tokens)
    for got, total in zip(many, sums, strict=True):
        exact = total / items
        # Rounded once to eight bits: half a unit of the last place, and float32's dust beneath it.
        assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-8 + exact.abs().max() * 1e-6).all()


def test_rank_0s_buffers_are_everybodys_as_without_us():
    first, second, third, fourth = pool(4).run(in_rank.averages, [5, 2, 0, 3])
    for other in (second, third, fourth):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert first[2] == 5  # batches that rank 0 tracked


@pytest.mark.parametrize("bucket", [1 << 25, 700])
def test_one_reduction_a_bucket_and_one_of_numbers(bucket):
    model = in_rank.language_model()
    every, line = 8, 9  # numbers of each rank
    ours = pool(2).run(in_rank.wire, every, bucket)
    assert ours[0] == ours[1]
    kinds = {kind for kind, _ in ours[0]}
    assert kinds == {"allgather_", "allreduce_"}
    assert ours[0][0] == ("allgather_", 8 * line)
    assert [kind for kind, _ in ours[0][1:]] == ["allreduce_"] * (len(ours[0]) - 1)
    gradients = [size for _, size in ours[0][1:]]
    assert sum(gradients) == sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    assert all(size <= max(bucket, largest) for size in gradients)
    assert len(gradients) == (1 if bucket > 700 else 3)  # 528 bytes of embedding, 432 in four tensors, 616 in two


DISAGREE = {
    "every": "The ranks disagree on every. Received: 4 (rank 0), items(4) (rank 1).",
    "clip_norm": "The ranks disagree on clip_norm. Received: None (rank 0), 1.0 (rank 1).",
    "dtype": "The ranks disagree on dtype. Received: torch.float32 (rank 0), None (rank 1).",
    "parameters": "The ranks disagree on parameter 2. "
    "Received: (6,) torch.float64 (rank 0), (6,) torch.float64 frozen (rank 1).",
    "number": "The ranks disagree on the number of parameters. Received: 7 (rank 0), 6 (rank 1).",
}


@pytest.mark.parametrize("name", DISAGREE)
def test_ranks_that_disagree_get_one_error(name):
    fix = " Every rank must build the same model and pass the same options."
    for outcome in pool(2).outcomes(in_rank.disagreeing, name):
        assert type(outcome) is ValueError
        assert str(outcome) == DISAGREE[name] + fix


def test_ranks_that_disagree_at_the_split_door_get_one_error():
    for outcome in pool(2).outcomes(in_rank.disagreeing_split):
        assert type(outcome) is ValueError
        assert "disagree on dtype. Received: torch.float64 (rank 0), torch.float32 (rank 1)." in str(outcome)


REFUSED = {
    "plain": (
        ValueError,
        "model must be wrapped in DistributedDataParallel or by fully_shard where there are several ranks",
    ),
    "static": (ValueError, "static_graph=True"),
    "noise": (ValueError, "Ranks do not close a window by its noise together. Received: every=until_noise("),
    "auto": (ValueError, 'micro_batch="auto" cannot be planned for shards. Pass a number with a fully_shard model.'),
    "not a module": (TypeError, "model must be a torch.nn.Module. Received: model='ddp' (str)."),
    "strange": (ValueError, "The loss reaches a parameter that is not the model's."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reduced_is_refused(name):
    kind, text = REFUSED[name]
    for outcome in pool(2).outcomes(in_rank.refused, name):
        assert type(outcome) is kind
        assert text in str(outcome)


def test_an_error_at_the_split_door_reaches_the_others():
    here, there = pool(2).outcomes(in_rank.split_error, 1)
    assert type(there) is OSError
    assert type(here) is RuntimeError
    assert str(here).startswith("Rank 1 could not take part. It raised OSError: a broken record. ")


def test_a_window_is_loaded_on_as_many_ranks_as_it_was_saved_on():
    states = pool(2).run(in_rank.saved_inside, 2)
    outcomes = pool(4).outcomes(in_rank.loads, each=[states[rank % 2][0] for rank in range(4)])
    for outcome in outcomes:
        assert type(outcome) is ValueError
        assert "inside a window on 2 ranks" in str(outcome)
    edge = pool(2).run(in_rank.saved_inside, 4)[0][0]
    assert pool(4).run(in_rank.loads, edge) == [1] * 4


def test_a_dead_rank_ends_the_others_with_a_clear_error():
    ranks = Pool(2)
    try:
        ranks.pipes[0].send((in_rank.survivor, ()))
        ranks.pipes[1].send((in_rank.survivor, ()))
        assert ranks.pipes[0].poll(30)
        outcome = ranks.pipes[0].recv()
    finally:
        ranks.close()
    assert type(outcome) is RuntimeError
    assert str(outcome).startswith("The ranks could not meet: ")
    assert "start again from the last checkpoint" in str(outcome)
