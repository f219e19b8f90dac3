"""The sixteen laws. Each is a function of an adapter (the first one three), and runs unchanged on every framework.

Two tiers: dyadic inputs, where every sum is exact and results are compared bit for bit, and random inputs against a
bound that is derived. Gradients in a window are always distinct, so that mean and last never agree by chance, and
SGD is among the optimizers, since Adam hides a wrong scale.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from conformance import jobs
from conformance.jobs import Params, Spec

# What a user reads, in every framework. Written out here, not imported: this is the other half of the contract.
MESSAGES: dict[str, tuple[type[Exception], str]] = {
    "items=-1": (
        ValueError,
        "items must be positive. Received: items=-1 (int). "
        "Pass the number of examples or tokens the loss is the mean of.",
    ),
    "items=0": (
        ValueError,
        "items must be positive. Received: items=0 (int). "
        "Pass the number of examples or tokens the loss is the mean of.",
    ),
    "items=nan": (
        ValueError,
        "items must be finite. Received: items=nan (float). "
        "Pass the number of examples or tokens the loss is the mean of.",
    ),
    "items='4'": (
        TypeError,
        "items must be a number. Received: items='4' (str). "
        "Pass the number of examples or tokens the loss is the mean of.",
    ),
    "every=0": (
        ValueError,
        "every must be at least 1. Received: every=0 (int). Pass the number of micro-batches that make one update.",
    ),
    "every=-2": (
        ValueError,
        "every must be at least 1. Received: every=-2 (int). Pass the number of micro-batches that make one update.",
    ),
    "every=2.5": (
        TypeError,
        "every must be an integer, a callable of the update's index, or items(n). Received: every=2.5 (float). "
        "Pass the number of micro-batches that make one update.",
    ),
    "every=True": (
        TypeError,
        "every must be an integer, a callable of the update's index, or items(n). Received: every=True (bool). "
        "Pass the number of micro-batches that make one update.",
    ),
    "micro_batch=0": (
        ValueError,
        "micro_batch must be at least 1. Received: micro_batch=0 (int). "
        "Pass the number of examples that fit in memory at once.",
    ),
    "micro_batch=2.5": (
        TypeError,
        'micro_batch must be an integer or "auto". Received: micro_batch=2.5 (float). '
        "Pass the number of examples that fit in memory at once.",
    ),
    "micro_batch='Auto'": (
        TypeError,
        "micro_batch must be an integer or \"auto\". Received: micro_batch='Auto' (str). "
        "Pass the number of examples that fit in memory at once.",
    ),
    # A batch {"x": …, "y": …} whose leaves are 8 and 7 examples long; then one whose leaves are empty.
    "lengths": (
        ValueError,
        "The leaves of a batch must have the same length. Received: batch['x'] of length 8, batch['y'] of length 7. "
        "Give every leaf one entry an example along its leading dimension.",
    ),
    "empty": (ValueError, "The batch is empty. Received: batch['x'] of length 0. Pass at least one example."),
}
SPLIT_MESSAGES = {"micro_batch=0", "micro_batch=2.5", "micro_batch='Auto'", "lengths", "empty"}
STREAM_MESSAGES = set(MESSAGES) - SPLIT_MESSAGES


def mean(adapter: Any) -> None:
    """1. Ragged, weighted micro-batches equal the full batch, bit for bit where every sum is exact."""
    sizes, items = ((4, 4, 4, 2), (2, 8, 4, 2)) if adapter.door == "split" else ((4, 1, 2, 1), (4, 1, 2, 1))
    for dtype in ("float32", "float64"):
        spec = Spec(params={"w": np.arange(jobs.D) / 4}, dtype=dtype)
        run = adapter.start(spec)
        micro_batches = jobs.dyadic(sizes, items, seed=1)
        run.window(micro_batches)
        _, gradient = jobs.loss_and_gradient("mean", spec.params, jobs.join(micro_batches))
        same(run.params(), {"w": spec.params["w"] - 0.5 * gradient["w"]}, f"dyadic {dtype}")


def mean_of_many_windows(adapter: Any) -> None:
    """1. So they do through ten updates of SGD with momentum and of AdamW, with a schedule, clipping and decay."""
    for optimizer in ("momentum", "adamw"):
        spec = _net(optimizer, clip_norm=0.2, rates=tuple(0.05 * 0.9**k for k in range(10)), decay=0.1)
        ours, plain = adapter.start(spec), adapter.plain(spec)
        for k in range(10):
            micro_batches = jobs.window("net", _ragged(adapter), seed=k)
            ours.window(micro_batches)
            plain.window(micro_batches)
        close(ours.params(), plain.params(), 1e-12, optimizer)


def mean_in_float32(adapter: Any) -> None:
    """1. A float32 update is as near the float64 full batch as the float32 full batch is, within γₘ times the envelope.

    m counts the roundings on the longest way from the data to a parameter: the two products and the bias of the
    forward, the three of the backward, the sum over the rows, the sum over the N micro-batches with a weight and a
    factor each, and the update. The envelope is the full batch's gradient with all terms in absolute value; micro-
    batches have the same terms, so the same envelope bounds theirs.
    """
    spec = replace(_net("sgd"), dtype="float32", rates=(1.0,))
    spec = replace(spec, params={k: v.astype(np.float32).astype(np.float64) for k, v in spec.params.items()})
    micro_batches = [
        {k: v.astype(np.float32).astype(np.float64) for k, v in m.items()}
        for m in jobs.window("net", _ragged(adapter), seed=3)
    ]
    full = jobs.join(micro_batches)
    _, exact = jobs.loss_and_gradient("net", spec.params, full)
    ours, plain = adapter.start(spec), adapter.plain(spec)
    ours.window(micro_batches)
    plain.window(micro_batches)
    m = (jobs.D + 1 + jobs.H + 2) + (jobs.H + 4) + len(full["x"]) + 3 * len(micro_batches) + 2
    u = 2.0**-24
    gamma = m * u / (1 - m * u)
    bound = jobs.envelope(spec.params, full)
    for name, start in spec.params.items():
        truth = start - exact[name]
        allowed = np.abs(plain.params()[name] - truth) + gamma * bound[name] + u * (np.abs(start) + np.abs(truth))
        error = np.abs(ours.params()[name] - truth)
        expect((error <= allowed).all(), f"float32 {name}: error {error.max()} over the bound {allowed.max()}")


def one(adapter: Any) -> None:
    """2. A window of one is the bare optimizer, bit for bit."""
    for optimizer, clip_norm in itertools.product(("momentum", "adamw"), (None, 0.2)):
        spec = _net(optimizer, every=1, clip_norm=clip_norm, dtype="float32", rates=(0.05, 0.03, 0.01), decay=0.1)
        ours, plain = adapter.start(spec), adapter.plain(spec)
        for k in range(3):
            micro_batches = jobs.window("net", (5,), seed=k)
            ours.window(micro_batches)
            plain.window(micro_batches)
        same(ours.params(), plain.params(), f"{optimizer}, clip_norm={clip_norm}")


def order(adapter: Any) -> None:
    """3. Distinct gradients in any order give the same update."""
    spec = Spec(params={"w": np.arange(jobs.D) / 4}, dtype="float32")
    # Four, for a share of them to be exact; a fourth of their orders, in which each comes first; and data with which
    # a running mean, rounded at each step, does not hide its order.
    micro_batches = jobs.dyadic((4, 4, 4, 4), (8, 2, 4, 2), seed=4)
    results = []
    for permuted in itertools.islice(itertools.permutations(micro_batches), 0, None, 4):
        run = adapter.start(spec)
        run.window(permuted)
        results.append(run.params())
    for result in results[1:]:
        same(result, results[0], "another order")


def once(adapter: Any) -> None:
    """4. Step count, schedule, weight decay, EMA, constraint and clipping happen once a window, after the mean."""
    spec = _net("adamw", clip_norm=0.2, rates=(0.05, 0.02, 0.01), decay=0.3, ema=0.9, shrink=0.75)
    ours, plain = adapter.start(spec), adapter.plain(spec)
    for k in range(3):
        micro_batches = jobs.window("net", _ragged(adapter), seed=k)
        ours.window(micro_batches)
        plain.window(micro_batches)
    close(ours.params(), plain.params(), 1e-12, "decay, schedule, constraint, clipping")
    close(ours.ema(), plain.ema(), 1e-12, "EMA")
    expect(ours.updates() == 3, f"3 windows made {ours.updates()} steps")

    # Opposite gradients: clipped one by one they would cancel, clipped after the mean they do not.
    spec = Spec(params={"w": np.zeros(jobs.D)}, clip_norm=1.0, every=2)
    one, other = jobs.dyadic((2, 2), (2, 2), seed=5)
    micro_batches = [{**one, "x": 8 * one["x"]}, {**other, "x": -one["x"]}]
    ours, plain = adapter.start(spec), adapter.plain(spec)
    ours.window(micro_batches)
    plain.window(micro_batches)
    close(ours.params(), plain.params(), 1e-12, "clipping before the mean")


def stillness(adapter: Any) -> None:
    """5. No parameter and nothing that the optimizer holds changes inside a window."""
    spec = _net("adamw", decay=0.3, ema=0.9, shrink=0.75, rates=(0.05, 0.02))
    run = adapter.start(spec)
    first = jobs.window("net", (3, 3, 3, 3), seed=0)
    run.window(first)
    params, held = run.params(), run.held()
    if adapter.door == "split":
        run.gradient(first)
        same(run.params(), params, "taking a gradient")
        same(run.held(), held, "taking a gradient")
        return
    for i, micro_batch in enumerate(first[:-1]):
        expect(run.feed(micro_batch) is None, "an update was reported inside a window")
        same(run.params(), params, f"after micro-batch {i}")
        same(run.held(), held, f"after micro-batch {i}")
    expect(run.feed(first[-1]) is not None, "the full window reported no update")
    expect(not _equal(run.params(), params), "the full window moved nothing")


def non_finite(adapter: Any) -> None:
    """6. A non-finite micro-batch never reaches the next window."""
    for poison in (np.nan, np.inf):
        spec = _net("adamw", decay=0.1, clip_norm=0.2)
        clean, run = adapter.start(spec), adapter.start(spec)
        good = jobs.window("net", (3, 3, 3, 3), seed=1)
        bad = [dict(m) for m in jobs.window("net", (3, 3, 3, 3), seed=2)]
        bad[1]["y"] = np.full(3, poison)
        report = run.window(bad)
        expect(bool(report.skipped), f"a window with {poison} was applied")
        same(run.params(), spec.params, f"after a window with {poison}")
        for k in range(2):
            run.window(good)
            clean.window(good)
            same(run.params(), clean.params(), f"window {k + 1} after {poison}")


def missing(adapter: Any) -> None:
    """7. A gradient absent from some micro-batches counts as zero there; absent from all, it stays absent."""
    spec = Spec("missing", jobs.params("missing"))
    run = adapter.start(spec)
    micro_batches = jobs.window("missing", (3, 3, 3, 3), seed=4)
    run.window(micro_batches)
    _, gradient = jobs.loss_and_gradient("missing", spec.params, jobs.join(micro_batches))
    expected = {name: p - 0.5 * (0 if gradient[name] is None else gradient[name]) for name, p in spec.params.items()}
    close(run.params(), expected, 1e-13, "SGD")
    same({"never": run.params()["never"]}, {"never": spec.params["never"]}, "a parameter without gradients")

    if adapter.absent:
        spec = replace(spec, optimizer="adamw", decay=0.5)
        run = adapter.start(spec)
        run.window(micro_batches)
        same({"never": run.params()["never"]}, {"never": spec.params["never"]}, "decayed without a gradient")


def precision(adapter: Any) -> None:
    """8. Half-precision models accumulate in float32: the error does not grow with N."""
    n, d = 2048, jobs.D
    rng = np.random.default_rng(0)
    x = _half(adapter.half, 1 + rng.normal(size=(n, d)))
    exact = x.mean(0)
    errors = {}
    for size in (1, n):
        run = adapter.start(Spec(params={"w": np.zeros(d)}, dtype="half", rates=(1.0,), every=n // size))
        run.window([{"x": x[i : i + size], "weight": np.ones(size)} for i in range(0, n, size)])
        errors[size] = float(np.linalg.norm(run.params()["w"] + exact) / np.linalg.norm(exact))
    # One rounding to a b-bit significand is off by at most 2⁻ᵇ; the floor allows for a lucky draw at N = 1.
    rounding = {"bfloat16": 2.0**-9, "float16": 2.0**-12}[adapter.half]
    expect(errors[1] <= max(1.1 * errors[n], rounding), f"error {errors[1]} at N = {n}, {errors[n]} at N = 1")


def tail(adapter: Any) -> None:
    """9. `flush` updates exactly from what is there: apply, carry or drop, and it says what it did."""
    if adapter.door == "split":
        spec = _net("momentum")
        for sizes in ((4, 4, 1), (3,), (2, 2, 2, 1)):
            ours, plain = adapter.start(spec), adapter.plain(spec)
            ours.window(jobs.window("net", sizes, seed=6))
            plain.window(jobs.window("net", sizes, seed=6))
            close(ours.params(), plain.params(), 1e-12, f"micro-batches of {sizes}")
        return
    full, part = jobs.window("net", (3, 1, 4, 2), seed=6), jobs.window("net", (2, 5, 1), seed=7)
    for partial in ("apply", "carry", "drop"):
        spec = _net("momentum", partial=partial)
        run, plain = adapter.start(spec), adapter.plain(spec)
        expect(run.flush() is None, "flush reported a window that held nothing")
        run.window(full)
        plain.window(full)
        for micro_batch in part:
            run.feed(micro_batch)
        report = run.flush()
        expect(report.micro_batches == 3, f"flush reported {report.micro_batches} micro-batches of 3")
        if partial == "apply":
            plain.window(part)
            expect(not report.skipped, f"flush skipped: {report.skipped}")
        else:
            said = {"carry": "carried", "drop": "dropped"}[partial]
            expect(said in str(report.skipped), f"flush said {report.skipped!r}")
        expect(run.pending == (3 if partial == "carry" else 0), f"{run.pending} pending after {partial}")
        close(run.params(), plain.params(), 1e-12, partial)
        more = jobs.window("net", (2, 2, 2, 2), seed=8)[: 1 if partial == "carry" else 4]
        for micro_batch in more:
            run.feed(micro_batch)
        plain.window([*part, *more] if partial == "carry" else more)
        close(run.params(), plain.params(), 1e-12, f"the window after {partial}")


def resume(adapter: Any) -> None:
    """10. Saved and restored inside a window, training goes on bit for bit."""
    spec = _net("adamw", decay=0.1, clip_norm=0.2, rates=(0.05, 0.03, 0.02), ema=0.9, dtype="float32")
    windows = [jobs.window("net", _ragged(adapter), seed=k) for k in range(3)]
    straight = adapter.start(spec)
    for micro_batches in windows:
        straight.window(micro_batches)

    inside = range(4) if adapter.door == "stream" else (0,)
    for place in inside:
        before, after = adapter.start(spec), adapter.start(spec)
        before.window(windows[0])
        for micro_batch in windows[1][:place]:
            before.feed(micro_batch)
        after.load(before.save())
        if place:
            expect(after.pending == place, f"{after.pending} pending after loading, {place} saved")
            for micro_batch in windows[1][place:]:
                after.feed(micro_batch)
        else:
            after.window(windows[1])
        after.window(windows[2])
        same(after.params(), straight.params(), f"saved after {place} of 4")
        same(after.held(), straight.held(), f"saved after {place} of 4")


def randomness(adapter: Any) -> None:
    """11. Each micro-batch draws its own dropout; the same seed draws the same."""
    d = 64
    spec = Spec("dropout", {"w": np.zeros(d)}, rates=(1.0,), every=2, dtype="float32", seed=7)
    ones = [{"x": np.ones((1, d)), "weight": np.ones(1)}] * 2

    def drawn(spec: Spec) -> list[np.ndarray]:
        run = adapter.start(spec)
        seen = [run.params()["w"]]
        for _ in range(2):
            run.window(ones)
            seen.append(run.params()["w"])
        return [before - after for before, after in itertools.pairwise(seen)]

    first, second = drawn(spec)
    # Half of the entries dropped, the rest doubled: two masks alike would give 0 and 2 only.
    values = set(np.round(first, 6))
    expect(values <= {0.0, 1.0, 2.0}, f"not the mean of two masks: {sorted(values)}")
    expect(1.0 in values, "both micro-batches drew the same dropout")
    expect(not np.array_equal(first, second), "both windows drew the same dropout")
    again = drawn(spec)
    expect(np.array_equal(first, again[0]) and np.array_equal(second, again[1]), "the same seed drew another dropout")
    expect(not np.array_equal(first, drawn(replace(spec, seed=8))[0]), "another seed drew the same dropout")


def ownership(adapter: Any) -> None:
    """12. Optimizers that overwrite the gradients they are given do no harm."""
    spec = _net("sgd")
    overwriting, plain = adapter.start(replace(spec, optimizer="overwriting")), adapter.plain(spec)
    for k in range(3):
        micro_batches = jobs.window("net", _ragged(adapter), seed=k)
        overwriting.window(micro_batches)
        plain.window(micro_batches)
    close(overwriting.params(), plain.params(), 1e-12, "an optimizer that overwrites its gradients")


def steady(adapter: Any) -> None:
    """13. After the first window nothing is retraced or recompiled; no host sync inside a window."""
    run = adapter.start(_net("adamw", clip_norm=0.2))
    windows = [jobs.window("net", (3, 3, 3, 2), seed=k) for k in range(4)]
    run.window(windows[0])
    compiled, _ = run.watch(lambda: [run.window(w) for w in windows[1:]])
    expect(compiled == 0, f"{compiled} compilations after the first window")
    if adapter.door == "stream":
        compiled, waits = run.watch(lambda: [run.feed(m) for m in windows[0][:3]])
        expect((compiled, waits) == (0, 0), f"inside a window: {compiled} compilations, {waits} waits of the host")
    else:
        _, waits = run.watch(lambda: run.gradient(windows[0]))
        expect(waits <= 1, f"one window made the host wait {waits} times")


def loss(adapter: Any) -> None:
    """14. The loss reported is the window's mean over items."""
    spec = _net("sgd")
    run = adapter.start(spec)
    micro_batches = jobs.window("net", _ragged(adapter), seed=9)
    report = run.window(micro_batches)
    full = jobs.join(micro_batches)
    expected, _ = jobs.loss_and_gradient("net", spec.params, full)
    close({"loss": np.float64(report.loss)}, {"loss": np.float64(expected)}, 1e-12, "loss")
    expect(abs(report.items - jobs.items(full)) < 1e-9, f"{report.items} items reported of {jobs.items(full)}")
    expect(report.micro_batches == len(micro_batches), f"{report.micro_batches} micro-batches reported")


def messages(adapter: Any) -> None:
    """15. The same mistake gets the same exception type and text in every framework."""
    mistakes = adapter.mistakes()
    wanted = SPLIT_MESSAGES if adapter.door == "split" else STREAM_MESSAGES
    expect(set(mistakes) == wanted, f"mistakes not tried or not known: {set(mistakes) ^ wanted}")
    for name, make in mistakes.items():
        kind, text = MESSAGES[name]
        before = adapter.untouched()
        try:
            make()
        except Exception as error:
            expect(type(error) is kind, f"{name}: {type(error).__name__}, not {kind.__name__}: {error}")
            expect(str(error) == text, f"{name}: said {str(error)!r}, not {text!r}")
        else:
            raise LawBroken(f"{name} was accepted")
        same(adapter.untouched(), before, name)


def alone(adapter: Any) -> None:
    """16. What others do to an open window's gradients is refused, never mixed in."""
    spec = _net("sgd")
    first, then = (jobs.window("net", _ragged(adapter), seed=seed) for seed in (11, 12))
    for name, place in itertools.product(adapter.start(spec).acts(), (0, 1, len(first) - 1)):
        what = f"{name} before micro-batch {place}"
        run, acted = adapter.start(spec), []
        refused = _disturbed(run, first, place, run.acts()[name], acted)
        expect(len(acted) == 1, f"{what}: the act took place {len(acted)} times")
        if refused is None:
            # Before a window opens anybody may move a parameter.
            close(run.params(), _stepped(acted[0][0] if place == 0 else spec.params, first), 1e-12, f"{what}, accepted")
        else:
            expect(name in refused, f"{what} was not named: {refused}")
            same(run.params(), acted[0][0], f"{what}, refused")
            same(run.held(), acted[0][1], f"{what}, refused")
        start = run.params()
        try:
            run.window(then)
        except Exception as error:
            raise LawBroken(f"the window after {what} raised {error!r}") from error
        close(run.params(), _stepped(start, then), 1e-12, f"the window after {what}")


def _disturbed(run: Any, micro_batches: Any, place: int, act: Callable[[], None], acted: list[Any]) -> str | None:
    """The refusal's text, or None where the window was accepted; `acted` gets what the act left of the run."""

    def acting() -> None:
        try:
            act()
        finally:
            acted.append((run.params(), run.held()))

    try:
        report = run.disturb(micro_batches, place, acting)
    except Exception as error:
        return str(error)
    skipped = getattr(report, "skipped", None)
    return str(skipped) if skipped else None


def _stepped(params: Params, micro_batches: Sequence[Any]) -> Params:
    """One step of SGD at `_net`'s rate, in closed form."""
    _, gradient = jobs.loss_and_gradient("net", params, jobs.join(micro_batches))
    return {name: p - 0.1 * gradient[name] for name, p in params.items()}


LAWS: dict[str, Callable[[Any], None]] = {
    law.__name__: law
    for law in (
        mean,
        mean_of_many_windows,
        mean_in_float32,
        one,
        order,
        once,
        stillness,
        non_finite,
        missing,
        precision,
        tail,
        resume,
        randomness,
        ownership,
        steady,
        loss,
        messages,
        alone,
    )
}


class LawBroken(AssertionError):
    """What a law raises, and nothing else does: an adapter that merely crashes has not been caught by its law."""


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise LawBroken(otherwise)


def same(got: Any, wanted: Any, what: str) -> None:
    """Bit for bit."""
    for name, g, w in _pairs(got, wanted):
        expect(np.array_equal(g, w), f"{what}: {name} differs by up to {_distance(g, w)}")


def close(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], relative: float, what: str) -> None:
    """Relative to the norm of each parameter."""
    for name, g, w in _pairs(got, wanted):
        allowed = relative * max(float(np.linalg.norm(w)), 1e-300)
        distance = float(np.linalg.norm(np.asarray(g) - np.asarray(w)))
        expect(distance <= allowed, f"{what}: {name} is off by {distance / max(np.linalg.norm(w), 1e-300):.3g}")


def _equal(got: Params, wanted: Params) -> bool:
    return all(np.array_equal(g, w) for _, g, w in _pairs(got, wanted))


def _pairs(got: Any, wanted: Any) -> Sequence[tuple[Any, Any, Any]]:
    if not isinstance(got, Mapping):
        got, wanted = dict(enumerate(got)), dict(enumerate(wanted))
    expect(got.keys() == wanted.keys(), f"{sorted(got)} where {sorted(wanted)} was expected")
    return [(name, got[name], wanted[name]) for name in wanted]


def _distance(g: Any, w: Any) -> Any:
    g, w = np.asarray(g), np.asarray(w)
    return np.abs(g - w).max() if g.shape == w.shape else f"its shape, {g.shape} for {w.shape}"


def _net(optimizer: str, **options: Any) -> Spec:
    options = {"rates": (0.1,), **options}
    return Spec("net", jobs.params("net"), optimizer, **options)


def _ragged(adapter: Any) -> tuple[int, ...]:
    return (3, 3, 3, 1) if adapter.door == "split" else (3, 1, 4, 2)


def _half(name: str, x: np.ndarray) -> np.ndarray:
    """Values that the 16-bit type holds exactly, so that the data brings no error of its own."""
    if name == "float16":
        return x.astype(np.float16).astype(np.float64)
    return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
