"""Whoever sets the flags of a model's own reduction, and wherever: a window's gradients are reduced once."""

import pytest
import torch

from conformance.ranks_pool import pool
from ranks import in_flags, in_rank
from ranks.test_ddp import alike, close, deal, windows_of

HOW = ["on everywhere", "at random", *(f"{how} {place}" for how, place in [
    ("entered before", "making"), ("entered before", "forward"), ("entered before", "backward"),
    ("entered before", "flush"), ("left after", "making"), ("left after", "forward"), ("left after", "flush"),
])]  # fmt: skip
KINDS = ["ddp", "fsdp window", "fsdp micro_batch"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_reduces_once(kind, how):
    dealt = deal((7, 7), seed=20)
    expected, _ = in_rank.one_process(windows_of(dealt, 2), in_rank.sgd)
    close(alike(pool(2).run(in_flags.stream, dealt, kind, how)), expected)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_the_split_api_reduces_once(kind, how):
    dealt = deal((3, 3), seed=21)
    expected, _ = in_rank.one_process(windows_of(dealt, 3), in_rank.sgd)
    close(alike(pool(2).run(in_flags.split, dealt, kind, how)), expected)


@pytest.mark.parametrize("act", ["forward_before", "split_inside", "copied", "compiled"])
def test_once_too(act):
    dealt = deal((2, 2), seed=22)
    expected, _ = in_rank.one_process(windows_of(dealt, 2), in_rank.sgd)
    close(alike(pool(2).run(getattr(in_flags, act), dealt)), expected)


@pytest.mark.parametrize("name", ["find_unused_parameters", "gradient_as_bucket_view", "hook"])
def test_options_of_the_wrapper_change_nothing(name):
    dealt = deal((4, 4), seed=24)
    expected, _ = in_rank.one_process(windows_of(dealt, 2), in_rank.sgd)
    close(alike(pool(2).run(in_flags.wrapper_options, dealt, name)), expected)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["ignored", "delayed"])
def test_parameters_that_the_wrapper_leaves_out_are_refused(name, size):
    for outcome in pool(size).outcomes(in_flags.wrapper_options, deal((2,) * size), name):
        assert type(outcome) is ValueError
        assert "made to leave parameters out of its reduction" in str(outcome)


@pytest.mark.parametrize("end", ["split", "accumulator", "accumulator, later"])
def test_afterwards_the_model_reduces_by_itself(end):
    dealt = deal((1, 1), seed=23)
    model = in_rank.language_model()
    sum(in_rank.loss_of(model, mine[0]) / 2 for mine in dealt).backward()
    for inside, gradients in pool(2).run(in_flags.afterwards, dealt, end):
        assert inside is False  # a no_sync() that is open stays so
        close(gradients, [p.grad for p in model.parameters()])


def test_a_forward_shares_no_buffers():
    first, second = pool(2).run(in_flags.averages, [5, 2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[2] == 5  # batches that rank 0 tracked


def test_the_private_names_are_there():
    pool(2).run(in_flags.private_names)


def test_join_of_the_model_is_refused():
    for outcome in pool(2).outcomes(in_flags.inside_join):
        assert type(outcome) is RuntimeError
        assert "Leave it out: flush() waits" in str(outcome)
    assert torch.equal(*pool(2).run(torch.ones, 1))  # and the ranks are in step
