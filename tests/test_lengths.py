"""Cutting by lengths: what `cuts` guarantees, for any lengths, and how near it comes to the best."""

import math
import random
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bigbatch.lengths import check_lengths, cuts, tokens

LENGTHS = st.lists(st.integers(1, 200), max_size=40)
OPTIONS = st.fixed_dictionaries({"multiple_of": st.sampled_from([1, 8]), "order": st.sampled_from(["length", "given"])})


def padded(found):
    return sum(cut.tokens for cut in found)


@given(LENGTHS, st.integers(1, 2000), OPTIONS)
def test_every_example_once_and_the_most_is_never_exceeded(lengths, most, options):
    found = cuts(lengths, most, **options)
    assert sorted(i for cut in found for i in cut.indices) == list(range(len(lengths)))
    for cut in found:
        needed = max(lengths[i] for i in cut.indices)
        assert needed <= cut.length < needed + options["multiple_of"]
        assert cut.tokens <= most or len(cut.indices) == 1
    if options["order"] == "given":
        assert [i for cut in found for i in cut.indices] == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 2000), st.sampled_from([1, 8]))
@example([4, 4, 12, 1, 1], 12, 1)  # filled by length alone it pads 3 tokens, in the given order none
def test_by_length_there_is_never_more_padding(lengths, most, multiple_of):
    by_length, as_given = (cuts(lengths, most, multiple_of=multiple_of, order=o) for o in ("length", "given"))
    assert padded(by_length) <= padded(as_given)


def test_near_the_best():
    """Against the shortest path over the sorted examples: padded tokens, and the price of each micro-batch."""
    draw, over = random.Random(0), []
    for _ in range(500):
        most = draw.randint(60, 240)
        price = most / 9
        rows = sorted((min(60, 1 + int(draw.lognormvariate(2.7, 1))) for _ in range(draw.randint(1, 14))), reverse=True)
        best = [0.0] + [math.inf] * len(rows)
        for i, longest in enumerate(rows):
            for j in range(i + 1, min(len(rows), i + most // longest) + 1):
                best[j] = min(best[j], best[i] + price + (j - i) * longest)
        found = cuts(rows, most, multiple_of=1)
        over.append((padded(found) + price * len(found)) / best[-1])
    assert sum(ratio <= 1.05 for ratio in over) >= 490
    assert max(over) <= 1.10


def lognormal(n, seed):
    draw = random.Random(seed)
    return [max(1, min(8192, int(draw.lognormvariate(math.log(300), 1.1)))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(10))
def test_little_padding_in_few_micro_batches(seed):
    lengths = lognormal(512, seed)
    found = cuts(lengths, 32_768)
    assert padded(found) <= 1.20 * sum(lengths)
    assert len(found) <= 1.8 * math.ceil(sum(lengths) / 32_768)  # fewer than that no packing has


def test_planning_costs_a_few_sorts():
    """Some three milliseconds (benchmarks/lengths.md); measured beside sorting, since the machine may be busy."""
    lengths, seconds = lognormal(4096, 0), {"cuts": [], "sort": []}
    for _ in range(15):
        for name, run in (("cuts", lambda: cuts(lengths, 32_768)), ("sort", lambda: sorted(lengths))):
            started = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - started)
    assert min(seconds["cuts"]) <= 20 * min(seconds["sort"]), seconds


def test_no_length_exceeds_the_batchs_own():
    assert [cut.length for cut in cuts([13, 9], 13, longest=13)] == [13, 13]


def test_what_tokens_accepts():
    assert repr(tokens(16_384, mask="attention_mask")) == "tokens(16384, mask='attention_mask')"
    assert tokens("auto", lengths=[3, 4]).most == "auto"
    for wrong, message in [
        (lambda: tokens(0, mask="m"), "most must be at least 1. Received: most=0"),
        (lambda: tokens("Auto", mask="m"), "most must be an integer or \"auto\". Received: most='Auto'"),
        (lambda: tokens(8), "either a mask or lengths"),
        (lambda: tokens(8, mask="m", lengths="n"), "either a mask or lengths"),
        (lambda: tokens(8, mask="m", order="random"), "order must be one of 'length', 'given'"),
        (lambda: tokens(8, mask="m", dim=0), "dimension 0 holds the examples"),
        (lambda: tokens(8, mask="m", multiple_of=0), "multiple_of must be at least 1"),
        (lambda: tokens(8, mask="m", trim="ids"), r"Pass \['ids'\]"),
        (lambda: check_lengths([3, 0], "lengths"), r"at least one token. Received: lengths\[1\]=0"),
        (lambda: check_lengths([3, 1.5], "lengths"), r"must be integers. Received: lengths\[1\]=1.5"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            wrong()
