"""Ranks that are not alike, or of which one fails: an error on every rank at once, and then they are in step again."""

import pytest
import torch

from conformance.ranks_pool import pool
from ranks import in_rank, in_step
from ranks.test_ddp import alike, close, deal, windows_of

MADE = {
    "class": "optimizer. Received: AdamW (rank 0), Adam (rank 1)",
    "lr": "param_groups[0]['lr']. Received: 0.2 (rank 0), 0.1 (rank 1)",
    "betas": "param_groups[0]['betas'][1]. Received: 0.999 (rank 0), 0.99 (rank 1)",
    "decay": "param_groups[0]['weight_decay']",
    "amsgrad": "param_groups[0]['amsgrad']. Received: False (rank 0), True (rank 1)",
    "tensor lr": "param_groups[0]['lr']. Received: 0.1",
    "order": "the order of the model's parameters. Received: [0, 1, 2, 3, 4, 5, 6] (rank 0), [0, 1, 2, 4, 3, 5, 6] (",
    "groups": "the number of parameters in param_groups[0]. Received: 4 (rank 0), 3 (rank 1)",
    "value": "the values of parameter 1",
    "half": "the values of parameter 5",
    "scheduler": "scheduler. Received: none (rank 0), StepLR (rank 1)",
    "gamma": "scheduler['gamma']. Received: 0.9 (rank 0), 0.5 (rank 1)",
    "scaler": "scaler. Received: none (rank 0), GradScaler (rank 1)",
    "scale": "scaler['scale']. Received: 4.0 (rank 0), 2.0 (rank 1)",
    "fused": "fused. Received: False (rank 0), True (rank 1)",
    "partial": "partial. Received: drop (rank 0), carry (rank 1)",
    "nonfinite": "nonfinite. Received: skip (rank 0), raise (rank 1)",
    "noise": "noise. Received: False (rank 0), True (rank 1)",
}


@pytest.mark.parametrize("name", MADE)
def test_ranks_that_were_made_differently_get_one_error(name):
    here, there = pool(2).outcomes(in_step.making, name)
    assert type(here) is ValueError
    assert str(here).startswith(f"The ranks disagree on {MADE[name]}")
    assert str(here) == str(there)


def test_a_callable_without_a_name_is_alike():
    pool(2).run(in_step.making, "same callable")


LATER = {
    "lr": "ValueError: The ranks disagree on param_groups[0]['lr']. Received: 0.1 (rank 0), 0.05 (rank 1).",
    "requires_grad": "ValueError: The ranks disagree on requires_grad. Received: 1111111 (rank 0), 0111111 (rank 1).",
    "index": "ValueError: The ranks disagree on the update's index. Received: 1 (rank 0), 7 (rank 1).",
    "every, sharded": "ValueError: The ranks disagree on every, for update 1. Received: 2 (rank 0), 1 (rank 1).",
}


@pytest.mark.parametrize("name", LATER)
def test_ranks_that_become_different_get_one_error_until_they_are_alike(name):
    dealt = deal((8, 8), seed=30)
    windows = windows_of(dealt, 2)
    if name == "every, sharded":  # refused before the window's first backward, and all go on with the next one
        windows = [windows[0], *windows_of([mine[3:7] for mine in dealt], 2)]
    else:
        windows = [windows[0], *windows[2:]]
    results = pool(2).run(in_step.later, dealt, name)
    for said, still, _ in results:
        assert [text.startswith(LATER[name]) for text in said] == [True], said
        assert still
    close(alike([found for *_, found in results]), in_rank.one_process(windows, in_rank.sgd)[0])


ARGUMENTS = {
    "every=0": "ValueError: every must be at least 1",
    "every='2'": "TypeError: every must be",
    "clip_norm": "ValueError: clip_norm must be positive",
    "nonfinite": "ValueError: nonfinite must be one of",
    "optimizer": "TypeError: optimizer must be",
    "scheduler": "TypeError: scheduler must",
    "model": "ValueError: model must be wrapped",
    "not a model": "TypeError: model must be a torch.nn.Module",
    "noise": "ValueError: noise must be",
    "micro_batch=0": "ValueError: micro_batch must be at least 1",
    "micro_batch='a'": "micro_batch must be",
    "batch": "TypeError: A leaf of a batch",
    "lengths": "ValueError: The leaves of a batch must have the same length",
    "raising": "OSError: a broken record",
    "loss": "ValueError: The loss must be a scalar",
    "items": "ValueError: items must be positive",
}
INSIDE = ("raising", "loss", "items")  # a sharded forward or backward, where the others cannot be told


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("kind", "name"), [
    *(("ddp", name) for name in ARGUMENTS),
    *(("fsdp window", name) for name in ARGUMENTS if name not in (*INSIDE, "model")),
])  # fmt: skip
def test_a_wrong_argument_on_one_rank_is_an_error_on_all_and_they_stay_in_step(name, kind, everywhere):
    dealt = deal((2, 2), seed=0)
    dealt = [in_rank.texts(2, seed=rank) for rank in range(2)]
    expected, _ = in_rank.one_process(windows_of(dealt, 2), in_rank.sgd)
    results = pool(2).run(in_step.wrong_argument, name, kind, everywhere)
    (here, _), (there, _) = results
    assert ARGUMENTS[name] in there
    if everywhere:
        assert ARGUMENTS[name] in here
    else:
        assert here.startswith("RuntimeError: Rank 1 could not take part. It raised ")
        assert ARGUMENTS[name] in here
    close(alike([found for _, found in results]), expected)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("name", ["loss", "items", "items, counted"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp window", "fsdp micro_batch"])
def test_a_wrong_micro_batch_on_one_rank_is_an_error_on_all(kind, name, place):
    dealt = deal((9, 9), seed=31)
    results = pool(2).run(in_step.wrong_micro_batch, dealt, name, place, kind, False)
    (here, found, _), (there, other, _) = results
    own = "The loss must be a scalar" if name == "loss" else "items must be positive"
    assert own in there[0]
    assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))
    if name == "items, counted" and kind != "ddp":
        return  # the window is open, and will fail when it closes
    assert len(here) == 1
    assert here[0].startswith("RuntimeError: Rank 1 could not take part. It raised ValueError")
    assert own in here[0]
    if name == "items, counted":
        return
    dealt = [mine[-3:] for mine in dealt] if kind == "ddp" else [mine[3:] for mine in dealt]
    close(found, in_rank.one_process(windows_of(dealt, 3), in_rank.sgd)[0])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_wrong_micro_batch_on_all_ranks_leaves_the_window_as_it_was(place):
    dealt = deal((7, 7), seed=32)
    results = pool(2).run(in_step.wrong_micro_batch, dealt, "items", place, "ddp", True)
    for said, _, index in results:
        assert len(said) == 1
        assert index == 2
    left = [[*mine[:place], *mine[place + 1 :]] for mine in dealt]
    close(alike([found for _, found, _ in results]), in_rank.one_process(windows_of(left, 3), in_rank.sgd)[0])


CALLS = [
    "Accumulator.backward", "Accumulator.flush", "Accumulator(...)", "Accumulator.load_state_dict",
    "bigbatch.torch.backward",
]  # fmt: skip


@pytest.mark.parametrize(("first", "second"), [
    (a, b) for a in CALLS for b in CALLS if a != b and {a, b} != {"Accumulator.backward", "Accumulator.flush"}
])  # fmt: skip
def test_ranks_at_different_calls_are_told_so_and_are_in_step_again(first, second):
    dealt = [in_rank.texts(2, seed=rank) for rank in range(2)]
    expected, _ = in_rank.one_process(windows_of(dealt, 2), in_rank.sgd)
    results = pool(2).run(in_step.apart, first, second)
    for said, _ in results:
        assert said.startswith(
            f"RuntimeError: The ranks are at different calls. Received: {first} (rank 0), {second} (rank 1)."
        )
    close(alike([found for _, found in results]), expected)


@pytest.mark.parametrize("kind", ["fsdp window", "fsdp micro_batch"])
def test_a_loader_that_fails_inside_join_is_an_error_on_all(kind):
    dealt = [in_rank.texts(2, seed=rank) for rank in range(2)]
    results = pool(2).run(in_step.broken_loader, kind)
    (here, _), (there, _) = results
    assert there == "OSError: a broken record"
    assert here.startswith("RuntimeError: Rank 1 could not take part. It raised OSError: a broken record.")
    close(alike([found for _, found in results]), in_rank.one_process(windows_of(dealt, 2), in_rank.sgd)[0])


ONE = {
    "static_graph": "static_graph=True",
    "until_noise": "Ranks do not close a window by its noise together",
    "sync": "sync says when a fully_shard model adds up over the ranks. Received: sync='micro_batch' (str), and a Dis",
    "sync, its default": "Received: sync='window' (str), and a DistributedDataParallel.",
    "sync without a model": "Received: sync='window' (str), and no model.",
    "split, sync": "sync says when",
    "fsdp1": "model must be wrapped in DistributedDataParallel or by fully_shard",
    "shards, auto": 'micro_batch="auto" cannot be planned for shards',
    "shards, until_noise": "Ranks do not close a window by its noise together",
    "shards, noise": "The noise scale needs a micro-batch's whole gradient",
    "shards, scaler": "scaler does not know shards",
    "shards, bfloat16": "fully_shard would add up gradients in torch.bfloat16",
    "shards, sync": "sync must be one of",
    "shards, divided": "gradient_divide_factor=4.0",
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ONE)
def test_what_several_ranks_refuse_one_refuses_too(name, size):
    for outcome in pool(size).outcomes(in_step.refused_on_one, name):
        assert type(outcome) is ValueError
        assert ONE[name] in str(outcome)


@pytest.mark.parametrize("kind", ["ddp", "fsdp window", "fsdp micro_batch"])
def test_one_rank_is_exact_as_several_are(kind):
    dealt = deal((7,), seed=33)
    expected, _ = in_rank.one_process(windows_of(dealt, 3), in_rank.adamw)
    options = {"kind": kind, "join": True}
    ((found, updates),) = pool(1).run(in_rank.stream, dealt, in_rank.adamw, 3, options)
    close(found, expected)
    assert [u.micro_batches for u in updates] == [3, 3, 1]
    windows = [[torch.cat(dealt[0])]]
    (split,) = pool(1).run(in_rank.split, windows, in_rank.sgd, 2, kind)
    close(split[:-1], in_rank.one_process(windows, in_rank.sgd)[0])
    ((straight, resumed),) = pool(1).run(in_rank.resumed, dealt, 2, kind)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("place", [1, 2])
@pytest.mark.parametrize("how", ["keys", "shapes", "index", "of rank 0", "not a state"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp window"])
def test_a_bad_state_on_one_rank_is_an_error_on_all_and_the_window_stays(kind, how, place):
    dealt = [in_rank.texts(3, seed=rank) for rank in range(2)]
    expected, _ = in_rank.one_process(windows_of(dealt, 3), in_rank.sgd)
    results = pool(2).run(in_step.bad_state, place, how, kind)
    for said, _ in results:
        assert said is not None
    if how == "of rank 0":
        assert "rank 0" in results[1][0]
    if how == "index":
        assert results[0][0].startswith("ValueError: The ranks disagree on the update's index of the state")
    close(alike([found for _, found in results]), expected)


ACTS = ["zero_grad", "set_to_none=False", "step", "backward", "backward()", "clip_grad_norm_", "in-place write",
        "second window"]  # fmt: skip


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("act", ACTS)
def test_an_act_of_somebody_else_on_one_rank_is_an_error_on_all(act, place):
    dealt = deal((6, 6), seed=34)
    results = pool(2).run(in_step.acts_on_one, dealt, act, place)
    for said, still, _ in results:
        assert act in said
        assert said.startswith("RuntimeError: ")
        assert still
    assert results[0][0].startswith("RuntimeError: Rank 1 could not take part. It raised RuntimeError: ")
    expected, _ = in_rank.one_process(windows_of([mine[3:] for mine in dealt], 3), in_rank.sgd)
    close(alike([found for *_, found in results]), expected)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", ["fsdp window", "fsdp micro_batch"])
def test_a_backward_of_somebody_else_is_no_part_of_a_window_of_shards(kind, place):
    dealt = deal((6, 6), seed=35)
    windows = windows_of(dealt, 3)
    results = pool(2).run(in_step.foreign_backward, dealt, kind, place)
    for said, _ in results:
        assert said is None if place == 0 else "changed by others" in said
    expected, _ = in_rank.one_process(windows if place == 0 else windows[1:], in_rank.sgd)
    close(alike([found for _, found in results]), expected)


def test_a_step_that_failed_on_one_rank_is_noticed_by_all():
    here, there = pool(2).run(in_step.step_failed, deal((4, 4), seed=36))
    assert there[1] == "OSError: no memory for its state"
    for said in here, there:
        assert said[3].startswith(
            "ValueError: The ranks disagree on the update's index. Received: 1 (rank 0), 0 (rank 1)"
        )
