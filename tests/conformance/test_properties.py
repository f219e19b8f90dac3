"""Random windows, weights and interruptions against exact rational arithmetic.

The job is "mean" under SGD with rate 1 and integer data, so a window moves w by −Σ nᵢ·gᵢ / Σ nᵢ, which `law.mean`
gives in `fractions.Fraction`. What a float64 door may be off by is derived: each of the k windows rounds its sums
at most N + 8 times, each time by u = 2⁻⁵³ relative to the terms' absolute values, and the parameter once.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigbatch import law
from conformance import jobs
from conformance.jobs import Spec

micro_batches = st.fixed_dictionaries({
    "n": st.integers(1, 3),
    "weight": st.integers(1, 9),
    "x": st.lists(st.integers(-50, 50), min_size=3 * jobs.D, max_size=3 * jobs.D),
})  # fmt: skip
interruptions = st.sampled_from(["flush", "reset", "save", "bad items", "NaN"])


def arrays(drawn):
    n = drawn["n"]
    x = np.array(drawn["x"][: n * jobs.D], dtype=np.float64).reshape(n, jobs.D)
    return {"x": x, "weight": np.full(n, float(drawn["weight"]))}


class Exact:
    """The law in fractions, with the bound on what floats may be off by."""

    def __init__(self):
        self.w = np.array([Fraction(0)] * jobs.D)
        self.bound = np.zeros(jobs.D)
        self.open = []

    def close(self):
        items = [int(jobs.items(m)) for m in self.open]
        if not any(items):  # no items, no update
            self.open = []
            return
        means = [law.mean([fractions(row) for row in m["x"]], [Fraction(1)] * len(m["x"])) for m in self.open]
        self.w = self.w - law.mean(means, items)
        sizes = law.mean([np.abs(m["x"]).mean(0) for m in self.open], items)
        rounded = (len(self.open) + 8) * sizes + np.abs(self.w.astype(float)) + sizes
        self.bound = self.bound + 2.0**-53 * rounded * 1.01
        self.open = []


def fractions(row):
    return np.array([Fraction(int(v)) for v in row])


def test_any_history_follows_the_law(adapter):
    # Elsewhere a graph is traced anew for each example. What products add to their API is met soon.
    eager = adapter.name.startswith(("torch", "ddp", "fsdp", "reference"))
    several = settings(max_examples=60 if eager and not adapter.name.endswith("products") else 15, deadline=None)
    actions = st.lists(st.one_of(micro_batches, interruptions), min_size=1, max_size=14)
    several(given(every=st.integers(1, 5), actions=actions)(lambda every, actions: history(adapter, every, actions)))()


def history(adapter, every, actions):
    """One history, step by step."""
    if adapter.door == "split":
        # A split door sees whole windows: the micro-batches between two interruptions, one row each.
        stream_of_rows(adapter, actions)
        return
    spec = Spec(params={"w": np.zeros(jobs.D)}, every=every, rates=(1.0,))
    run, exact = adapter.start(spec), Exact()
    for action in actions:
        if isinstance(action, dict):
            m = arrays(action)
            exact.open.append(m)
            report = run.feed(m)
            assert (report is not None) == (len(exact.open) == every)
            if report is not None:
                exact.close()
        elif action == "flush":
            report = run.flush()
            assert (report is None) == (not exact.open)
            if exact.open:
                exact.close()
        elif action == "reset":
            run.reset()
            exact.open = []
        elif action == "save":
            saved = run.save()
            run = adapter.start(spec)
            run.load(saved)
        elif action == "bad items" and adapter.refusal is None:
            # What is traced into a program cannot be refused. No items count for nothing, in a micro-batch like others.
            exact.open.append({"x": np.zeros((1, jobs.D)), "weight": np.zeros(1)})
            run.feed(exact.open[-1])
            if len(exact.open) == every:
                exact.close()
        elif action == "bad items":
            # Where items are a tensor in a graph, the framework's own error carries the words.
            with pytest.raises(adapter.refusal, match="items must be positive"):
                run.feed({"x": np.zeros((1, jobs.D)), "weight": np.zeros(1)})
        else:
            run.feed({"x": np.full((1, jobs.D), np.nan), "weight": np.ones(1)})
            if exact.open or every > 1:  # the poisoned window is closed, and makes no update
                run.flush()
            exact.open = []
        assert run.pending == len(exact.open)
        check(run, exact)


def stream_of_rows(adapter, actions):
    spec = Spec(params={"w": np.zeros(jobs.D)}, rates=(1.0,))
    run, exact = adapter.start(spec), Exact()
    for action in actions:
        if isinstance(action, dict):
            m = arrays(action)
            exact.open.append({"x": m["x"][:1], "weight": m["weight"][:1]})
        # A window holds `every` micro-batches at most, at a door that counts them out of sight too.
        if len(exact.open) == spec.every or (exact.open and not isinstance(action, dict)):
            run.window(exact.open)
            exact.close()
            check(run, exact)


def check(run, exact):
    error = np.abs(run.params()["w"] - exact.w.astype(float))
    assert (error <= exact.bound + 2.0**-53 * np.abs(exact.w.astype(float))).all()
