"""The noise scale's estimators against known truth, the advice, and windows that close themselves."""

import csv
import io
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from bigbatch import noise
from bigbatch.noise import Noise, NoiseScale, advice, estimate, noise_curve, until_noise

# What `peers.md` measured: ragged windows, and a truth to find.
EQUAL, RAGGED = [4] * 8, [1, 2, 3, 10, 4, 4, 6, 2]
D = 40
SCALES = np.linspace(0.5, 4, D)  # an item's gradient has this standard deviation along each axis
GRADIENT = np.full(D, math.sqrt(5 / D))
TRACE, SQUARED_NORM = float((SCALES**2).sum()), float(GRADIENT @ GRADIENT)


def windows(sizes, count, seed=0):
    """`count` windows' gradients, shape (count, N, D), and items (N,)."""
    rng = np.random.default_rng(seed)
    items = np.array(sizes)
    noise = rng.standard_normal((count, len(items), D)) * SCALES / np.sqrt(items)[:, None]
    return GRADIENT + noise, items


def sums(gradients, items):
    """Σ bᵢ‖gᵢ‖² and ‖G‖² of each window."""
    means = np.einsum("knd,n->kd", gradients, items) / items.sum()
    return np.einsum("knd,knd,n->k", gradients, gradients, items), (means**2).sum(1)


@pytest.mark.parametrize("sizes", [EQUAL, RAGGED, [1, 1], [1, 50]], ids=["equal", "ragged", "two", "two ragged"])
def test_the_estimators_are_unbiased(sizes):
    count = 200_000 if len(sizes) == 2 else 100_000
    gradients, items = windows(sizes, count)
    squares, square = sums(gradients, items)
    trace, squared_norm = estimate(len(items), items.sum(), squares, square)
    # Within 1 % of the truth, and within what this many windows can tell.
    for got, truth in ((trace, TRACE), (squared_norm, SQUARED_NORM)):
        if abs(got.std() / math.sqrt(count)) < truth / 300:
            assert abs(got.mean() / truth - 1) < 0.01
        assert abs(got.mean() - truth) < 4 * got.std() / math.sqrt(count)


def test_both_are_within_one_percent_on_the_windows_that_a_training_has():
    for sizes in (EQUAL, RAGGED):
        gradients, items = windows(sizes, 100_000)
        trace, squared_norm = estimate(len(items), items.sum(), *sums(gradients, items))
        assert abs(trace.mean() / TRACE - 1) < 0.01
        assert abs(squared_norm.mean() / SQUARED_NORM - 1) < 0.01


def test_the_textbook_form_is_wrong_on_ragged_windows():
    """McCandlish's two-batch form with the mean size as the small batch: what most code has."""
    gradients, items = windows(RAGGED, 50_000)
    _, square = sums(gradients, items)
    small, big = items.mean(), items.sum()
    mean_square = (gradients**2).sum(2).mean(1)
    squared_norm = (big * square - small * mean_square) / (big - small)
    trace = (mean_square - square) / (1 / small - 1 / big)
    assert trace.mean() / TRACE > 1.4
    assert squared_norm.mean() / SQUARED_NORM < 0.5


def test_a_ratio_a_window_is_a_trap():
    """The mean of each window's ratio has nothing to do with the ratio of the means."""
    gradients, items = windows([2, 2], 2_000)
    trace, squared_norm = estimate(2, 4, *sums(gradients, items))
    truth = TRACE / SQUARED_NORM
    assert abs(np.mean(trace / squared_norm) / truth - 1) > 0.5
    running = NoiseScale(decay=0.9995)
    for t, s in zip(trace, squared_norm, strict=True):
        running.add(Noise(2, 4, t, s))
    low, high = running.interval
    assert low < truth < high


def test_the_estimators_run_on_fractions():
    gradients, items = [Fraction(1), Fraction(5)], [3, 1]
    mean = sum(b * g for b, g in zip(items, gradients, strict=True)) / 4
    squares = sum(b * g * g for b, g in zip(items, gradients, strict=True))
    # Four items, two of them known by their mean: tr Σ̂ = Σ bᵢ(gᵢ − G)² / (N − 1).
    assert estimate(2, 4, squares, mean * mean) == (12, 1)


def test_the_uncertainty_is_what_repetitions_show():
    running = []
    for seed in range(200):
        gradients, items = windows(RAGGED, 60, seed)
        trace, squared_norm = estimate(len(items), items.sum(), *sums(gradients, items))
        one = NoiseScale(decay=0.98)
        for t, s in zip(trace, squared_norm, strict=True):
            one.add(Noise(8, 32, t, s))
        running.append(one)
    inside = [one.interval[0] <= TRACE / SQUARED_NORM <= one.interval[1] for one in running]
    assert 0.88 <= np.mean(inside) <= 0.99
    scales = np.array([one.scale for one in running])
    assert 0.7 < np.median([one.error for one in running]) / scales.std() < 1.3


# What cannot be told.


def test_one_micro_batch_shows_no_variance():
    lone = Noise.of(1, 32, 5.0, 5.0)
    assert math.isnan(lone.trace)
    running = NoiseScale()
    running.add(lone)
    running.add(None)
    assert running.windows == 0
    assert math.isnan(running.scale)
    assert str(running) == "not known: no window held two micro-batches or more"
    assert advice(running, batch=64, micro_batch=8).verdict == "not known"


def test_a_window_of_nan_leaves_no_trace():
    running = NoiseScale()
    running.add(Noise(4, 16, 10.0, 1.0))
    for bad in (math.nan, math.inf):
        running.add(Noise.of(4, 16, bad, 1.0))
    assert (running.windows, running.scale) == (1, 10.0)


def test_zero_gradients():
    running = NoiseScale()
    for _ in range(3):
        running.add(Noise.of(4, 16, 0.0, 0.0))
    assert math.isnan(running.scale)
    assert str(running) == "none: the gradient is zero, over 3 windows"


def test_no_noise_at_all():
    running = NoiseScale()
    for _ in range(3):
        running.add(Noise.of(4, 16, 16 * 2.0, 2.0))
    assert running.scale == 0
    assert advice(running, batch=64, micro_batch=8).every == 1


def test_a_gradient_that_noise_hides():
    running = NoiseScale()
    for squared_norm in (-1.0, 0.5, -0.2, 0.4):
        running.add(Noise(4, 16, 10.0, squared_norm))
    assert running.scale == math.inf
    assert running.interval[1] == math.inf
    assert 0 < running.interval[0] < math.inf
    assert "not told from noise yet over 4 windows" in str(running)


@pytest.mark.parametrize("decay", [1, -0.1, True, "0.9"])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        NoiseScale(decay)


def test_saved_and_restored():
    one, other = NoiseScale(0.9), NoiseScale()
    for k in range(5):
        one.add(Noise(4, 16, 10.0 + k, 1.0 + k % 2))
    other.load_state_dict(one.state_dict())
    assert other.as_dict() == one.as_dict()
    assert all(isinstance(x, float | int) for x in [one.decay, one.windows, *one.state_dict()["moments"]])


def test_the_curve_is_rows_for_csv():
    updates = [SimpleNamespace(index=k, items=16, noise=Noise(4, 16, 10.0 + k, 1.0)) for k in range(3)]
    rows = noise_curve([updates[0], None, SimpleNamespace(index=9, items=1, noise=None), *updates[1:]])
    assert [row["update"] for row in rows] == [0, 1, 2]
    assert rows[0]["noise_scale"] == 10
    written = io.StringIO()
    writer = csv.DictWriter(written, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    assert written.getvalue().startswith("update,items,noise_scale,noise_scale_error,")


# Advice.


def known(scale, error=0.15, windows=30):
    running, rng = NoiseScale(0.98), np.random.default_rng(0)
    spread = rng.standard_normal(windows) * error * math.sqrt(windows)
    for s in spread - spread.mean():
        running.add(Noise(8, 64, scale, 1.0 + s))
    return running


def test_a_batch_far_past_the_noise_scale_is_wasteful():
    said = advice(known(340), batch=4096, micro_batch=64, beta2=0.95)
    assert (said.verdict, said.every) == ("wasteful", 6)
    assert said.ratio == pytest.approx(12, rel=0.1)
    for words in ("Your batch of 4,096 is 12 × the noise scale (34", "every=6", "16% of the examples",
                  "in 1.7 × as many updates", "batch 64 with β₂ = 0.9992 instead of 0.95", "2018", "2025"):  # fmt: skip
        assert words in str(said)


def test_a_batch_below_the_noise_scale_is_worth_it():
    said = advice(known(10_000), batch=1024, micro_batch=16)
    assert said.verdict == "worth it"
    assert "It is worth it: your batch of 1,024 is 0.1 × the noise scale" in said.text
    assert "58 × fewer updates to the same loss, for 1.1 × the examples" in said.text


def test_a_batch_just_past_it_is_told_so():
    assert advice(known(500), batch=1024, micro_batch=16).verdict == "past the knee"


def test_too_little_is_known():
    said = advice(known(340, windows=3, error=3.0), batch=4096, micro_batch=64)
    assert (said.verdict, said.every) == ("not known", None)
    assert "not known well enough yet" in said.text


def test_a_noise_scale_without_an_upper_end_may_still_be_above_the_batch():
    running = NoiseScale()
    for squared_norm in (-1.0, 0.5, -0.2, 0.4):
        running.add(Noise(4, 16, 10_000.0, squared_norm))
    assert advice(running, batch=64, micro_batch=16).verdict == "worth it"
    assert advice(running, batch=1e9, micro_batch=16).verdict == "not known"


def test_advice_checks_what_it_is_given():
    with pytest.raises(ValueError, match="items must be positive"):
        advice(known(340), batch=0, micro_batch=16)


def test_every_number_of_the_advice_follows_the_model():
    """(S/Smin − 1)(E/Emin − 1) = 1, McCandlish et al. 2018, equation 2.11."""
    scale, batch = 340.0, 4096.0
    assert (1 + scale / batch - 1) * (1 + batch / scale - 1) == pytest.approx(1)


# Windows that close themselves.


def test_looks_grow_by_a_quarter():
    assert until_noise(at_most=20).looks == (2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 18, 20)
    assert until_noise(at_most=2).looks == (2,)
    assert len(until_noise(at_most=4096).looks) < 40


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"eta": 0, "at_most": 8}, ValueError, "eta must be positive and finite. Received: eta=0"),
        ({"eta": math.nan, "at_most": 8}, ValueError, "eta must be positive and finite"),
        ({"eta": "1", "at_most": 8}, TypeError, "eta must be a number. Received: eta='1'"),
        ({"eta": True, "at_most": 8}, TypeError, "eta must be a number"),
        ({"at_most": 1}, ValueError, "at_most must be at least 2, for one micro-batch shows no noise"),
        ({"at_most": 0}, ValueError, "at_most must be at least 1"),
        ({"at_most": 2.5}, TypeError, "at_most must be an integer"),
    ],
)
def test_until_noise_is_checked(options, kind, words):
    with pytest.raises(kind, match=words):
        until_noise(**options)


@pytest.mark.parametrize("value", [0, -1, 1.5, "yes", None])
def test_noise_is_checked(value):
    with pytest.raises(ValueError, match="noise must be True, False or an integer of at least 1"):
        noise.one_in(value)
    assert [noise.one_in(v) for v in (False, True, 1, 7)] == [0, 20, 1, 7]


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_self_closing_windows_hold_the_noise_scale_over_eta_squared(eta):
    """The size is about right, and biased towards early: the documented cost of stopping when it looks good."""
    every, rng = until_noise(eta=eta, at_most=1024), np.random.default_rng(0)
    d, size = 400, 2
    gradient = np.full(d, 1 / math.sqrt(d))  # ‖∇L‖ = 1, and tr Σ = the noise scale
    scale = 100.0
    closed = []
    for _ in range(200):
        gradients = gradient + rng.standard_normal((1024, d)) * math.sqrt(scale / d / size)
        sums, squares = gradients.cumsum(0), (gradients**2).sum(1).cumsum() * size
        for n in every.looks:
            square = ((sums[n - 1] / n) ** 2).sum()
            if every.is_enough(n * size, *estimate(n, n * size, squares[n - 1], square)):
                break
        closed.append(n * size)
    assert 0.6 < np.mean(closed) / (scale / eta**2) < 1.15


def test_zero_gradients_close_at_the_first_look_and_nan_never():
    every = until_noise(at_most=8)
    assert every.is_enough(4, 0.0, 0.0)
    assert not every.is_enough(4, math.nan, math.nan)
