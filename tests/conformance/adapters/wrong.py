"""Adapters that are wrong on purpose, each in a way that somebody's code is. `WRONG` names the law that must see it."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from bigbatch import errors
from conformance import jobs
from conformance.adapters.reference import Gradient, Reference, ReferenceRun
from conformance.jobs import MicroBatch


class LastGradientOnly(ReferenceRun):
    def mean(self) -> Gradient:
        return self.gradients[-1]


class SumNotMean(ReferenceRun):
    def mean(self) -> Gradient:
        count = sum(self.items)
        return {name: None if g is None else g * count for name, g in super().mean().items()}


class MeanOfMeans(ReferenceRun):
    def mean(self) -> Gradient:
        items, self.items = self.items, [1.0] * self.pending
        means = super().mean()
        self.items = items
        return means


class RunningAverage(ReferenceRun):
    """gₖ₊₁ = (gₖ + g) / 2 gives the last micro-batch half of the weight."""

    def mean(self) -> Gradient:
        total = self.gradients[0]
        for g in self.gradients[1:]:
            total = {n: None if a is None or g[n] is None else (a + g[n]) / 2 for n, a in total.items()}
        return total


class AlwaysDividedByPlan(ReferenceRun):
    """A window of one that still makes the round trip over every, in the wrong dtype."""

    def mean(self) -> Gradient:
        third = self.dtype(1 / 3)
        return {n: None if g is None else (g * third) / third for n, g in super().mean().items()}


class TailDividedByEvery(ReferenceRun):
    def mean(self) -> Gradient:
        short = self.pending / self.spec.every
        return {name: None if g is None else g * short for name, g in super().mean().items()}


class SteppingEachMicroBatch(ReferenceRun):
    """Zero gradients between the updates: momentum and Adam move all the same."""

    def feed(self, micro_batch: MicroBatch) -> SimpleNamespace | None:
        report = super().feed(micro_batch)
        if report is None:
            self.apply({name: np.zeros_like(p) for name, p in self.p.items()})
            self.opened = self.state["step"]  # so that it does not take its own step for somebody else's
        return report


class DecayEachMicroBatch(ReferenceRun):
    def feed(self, micro_batch: MicroBatch) -> SimpleNamespace | None:
        if self.pending:
            self.p = {name: p * (1 - self.rate() * self.spec.decay) for name, p in self.p.items()}
        return super().feed(micro_batch)


class DecayOnceTooOften(ReferenceRun):
    """Decay after the update as well, so that no micro-batch moves a parameter but the window does twice."""

    def apply(self, gradient: Gradient) -> None:
        super().apply(gradient)
        self.p = {name: p * (1 - self.rate() * self.spec.decay) for name, p in self.p.items()}


class ScheduleEachMicroBatch(ReferenceRun):
    def rate(self) -> float:
        return self.spec.rates[min(self.state["step"] * self.spec.every, len(self.spec.rates) - 1)]


class ClippingBeforeTheMean(ReferenceRun):
    def loss_and_gradient(self, m: MicroBatch) -> tuple[float, Gradient]:
        loss, gradient = super().loss_and_gradient(m)
        return loss, super().clip(gradient)

    def clip(self, gradient: Gradient) -> Gradient:
        return gradient


class ResetByMultiplying(ReferenceRun):
    """acc = (1 − emit)·acc: a NaN times zero is a NaN."""

    left: Gradient | None = None

    def mean(self) -> Gradient:
        means = super().mean()
        if self.left is not None:
            means = {n: None if g is None else g + 0 * self.left[n] for n, g in means.items()}
        self.left = means
        return means


class LostWhenAbsentAtTheEnd(ReferenceRun):
    def mean(self) -> Gradient:
        return {n: None if self.gradients[-1][n] is None else g for n, g in super().mean().items()}


class DuplicatesOverwritten(ReferenceRun):
    """table[ids] = rows keeps one row of those that name the same place."""

    def loss_and_gradient(self, m: MicroBatch) -> tuple[float, Gradient]:
        loss, gradient = super().loss_and_gradient(m)
        if gradient.get("table") is not None:
            gradient["table"] = np.zeros_like(self.p["table"])
            gradient["table"][m["ids"]] = (m["weight"] / m["weight"].sum())[:, None] * m["x"]
        return loss, gradient


class AbsentMadeZero(ReferenceRun):
    """A decayed parameter that no loss ever saw."""

    def mean(self) -> Gradient:
        return {n: np.zeros_like(self.p[n]) if g is None else g for n, g in super().mean().items()}


class HalfPrecisionAccumulation(ReferenceRun):
    def mean(self) -> Gradient:
        totals = {name: np.zeros_like(p) for name, p in self.p.items()}
        for gradient, n in zip(self.gradients, self.items, strict=True):
            for name, g in gradient.items():
                if g is not None:
                    totals[name] = (totals[name] + g * self.dtype(n / sum(self.items))).astype(self.dtype)
        return totals


class ForgetsItemsOnSave(ReferenceRun):
    def load(self, saved: bytes) -> None:
        super().load(saved)
        self.items = [1.0] * self.pending


class SameNoise(ReferenceRun):
    """One key for the window, as t5x has."""

    def loss_and_gradient(self, m: MicroBatch) -> tuple[float, Gradient]:
        if not self.pending:
            self.key = self.state["rng"].integers(1 << 30)
        rng, self.state["rng"] = self.state["rng"], np.random.default_rng(self.key)
        result = super().loss_and_gradient(m)
        self.state["rng"] = rng
        return result


class AliasedAccumulator(ReferenceRun):
    """Starts the next window from the array that the optimizer was given."""

    given: Gradient | None = None

    def mean(self) -> Gradient:
        means = super().mean()
        if self.given is not None:
            means = {n: None if g is None else g + np.where(self.given[n] == 0, 0, self.given[n])
                     for n, g in means.items()}  # fmt: skip
        self.given = {n: None if g is None else np.zeros_like(g) for n, g in means.items()}
        return means

    def apply(self, gradient: Gradient) -> None:
        super().apply(gradient)
        if self.spec.optimizer == "overwriting":
            self.given = gradient


class RetracesEachWindow(ReferenceRun):
    def close(self) -> SimpleNamespace:
        self.compiled += 1
        return super().close()


class WaitsEachMicroBatch(ReferenceRun):
    def feed(self, micro_batch: MicroBatch) -> SimpleNamespace | None:
        self.waits += 1
        return super().feed(micro_batch)


class LastLoss(ReferenceRun):
    def loss(self) -> float:
        return self.losses[-1]


class OtherWords(Reference):
    def mistakes(self) -> dict[str, Any]:
        def other() -> None:
            raise ValueError("bad items")

        return {**super().mistakes(), "items=-1": other}


class MovesBeforeItRefuses(Reference):
    moved = 0.0

    def mistakes(self) -> dict[str, Any]:
        def late() -> None:
            self.moved += 1
            errors.check_items(-1)

        return {**super().mistakes(), "items=-1": late}

    def untouched(self) -> jobs.Params:
        return {"w": np.full(1, self.moved)}


class MixesInWhatOthersDo(ReferenceRun):
    """`.grad` is whoever's: cleared inside a window it is short, and what another adds counts as one item."""

    def refuse_others(self) -> None:
        pass

    def mean(self) -> Gradient:
        items, n = self.items, len(self.gradients)
        self.items = (items[-n:] + [1.0] * n)[:n]
        means = super().mean()
        self.items = items
        return means


class DiscardsAtTheDoorOnly(MixesInWhatOthersDo):
    """Clears what lies there when a window opens, and looks no more."""

    def refuse_others(self) -> None:
        if not self.pending:
            self.reset()


class KeepsWhatItRefused(ReferenceRun):
    """Raises, and leaves the window as the other left it."""

    def refuse_others(self) -> None:
        left = self.gradients, self.items, self.losses
        try:
            super().refuse_others()
        except RuntimeError:
            self.gradients, self.items, self.losses = left
            raise


class RefusesWithoutAName(ReferenceRun):
    def refuse_others(self) -> None:
        try:
            super().refuse_others()
        except RuntimeError:
            raise RuntimeError("The window is not as it was.") from None


WRONG: dict[str, list[Any]] = {
    "mean": [LastGradientOnly, SumNotMean, MeanOfMeans],
    "mean_of_many_windows": [LastGradientOnly, SumNotMean, MeanOfMeans],
    "mean_in_float32": [LastGradientOnly, SumNotMean, MeanOfMeans],
    "one": [AlwaysDividedByPlan],
    "order": [RunningAverage, LastGradientOnly],
    "once": [ClippingBeforeTheMean, DecayOnceTooOften, DecayEachMicroBatch, ScheduleEachMicroBatch],
    "stillness": [SteppingEachMicroBatch, DecayEachMicroBatch],
    "non_finite": [ResetByMultiplying],
    "missing": [LostWhenAbsentAtTheEnd, DuplicatesOverwritten, AbsentMadeZero],
    "precision": [HalfPrecisionAccumulation],
    "tail": [TailDividedByEvery],
    "resume": [ForgetsItemsOnSave],
    "randomness": [SameNoise],
    "ownership": [AliasedAccumulator],
    "steady": [RetracesEachWindow, WaitsEachMicroBatch],
    "loss": [LastLoss],
    "messages": [OtherWords("OtherWords"), MovesBeforeItRefuses("MovesBeforeItRefuses")],
    "alone": [MixesInWhatOthersDo, DiscardsAtTheDoorOnly, KeepsWhatItRefused, RefusesWithoutAName],
}


def adapter(wrong: Any) -> Any:
    return Reference(wrong.__name__, wrong) if isinstance(wrong, type) else wrong
