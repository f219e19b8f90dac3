"""The experiments of an audit: which runs to make, and what they mean (see `bigbatch.audit`).

A package brings an `AuditRunner`: its gradients of any examples of the batch, with the random state seeded and
everything restored after each run. Causes are found by experiment; no class is looked up by its name.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

from bigbatch import errors
from bigbatch.audit import COARSE, FINE, LOOSE, Audit, Cause, Compared, compared, differing, floor_of, rank
from bigbatch.audit_probe import Examples, Probe, Run


class AuditRunner(Protocol):
    """What a package brings: a batch, a loss function, and runs that change no state."""

    length: int  # of the batch
    micro_batch: int
    dtype: str  # that the runs are made in

    def gradient(
        self,
        parts: Sequence[Examples],
        *,
        seed: int,
        quiet: frozenset[str],
        fresh: bool = False,
        items: Any = None,
        scale: float = 1.0,
    ) -> dict[str, Any]:
        """Σ nᵢ·gᵢ / Σ nᵢ over parts, each a micro-batch of these examples of the batch: float64 arrays by name.

        Args:
            parts: the examples of each micro-batch.
            seed: of the random state, set once before the first part.
            quiet: the modules that are put in evaluation mode.
            fresh: whether the model's state is restored before each part and not only before the first.
            items: nᵢ to use in place of what the loss function says.
            scale: the loss is multiplied by this and its gradient divided, so that it is rounded otherwise.
        """
        ...

    def loss(self, rows: Examples, *, seed: int, quiet: frozenset[str]) -> Run:
        """One forward pass over these examples."""
        ...

    def sources(self, rows: Examples, seed: int, quiet: frozenset[str]) -> list[str]:
        """The modules at which a run over the batch's first examples first differs from the whole batch's (seed 0).

        Their inputs agree on these examples, and their outputs do not. Empty where modules cannot be traced.
        """
        ...


def examine(runner: AuditRunner) -> Audit:
    """Makes the experiments and says what they showed."""
    return _Examination(runner).run()


class _Examination:
    """One audit: the batch, its micro-batches, and the modules that are in evaluation mode so far."""

    def __init__(self, runner: AuditRunner):
        self.runner = runner
        self.all = range(runner.length)
        self.parts = [self.all[i : i + runner.micro_batch] for i in range(0, runner.length, runner.micro_batch)]
        self.quiet: frozenset[str] = frozenset()
        self.causes: list[Cause] = []
        self.allowed = LOOSE if runner.dtype in ("float64", "float32") else COARSE

    def run(self) -> Audit:
        full = self.full()
        stochastic = False
        if self.differ(full, self.full()):
            if not math.isfinite(value := self.loss(self.all).loss):
                raise errors.loss_not_finite(value, "the whole batch")
            self.causes.append(
                Cause(
                    "not deterministic",
                    (),
                    "The same batch gave two gradients from the same seed: the loss function keeps something from "
                    "call to call, or draws from a generator of its own.",
                    "Make it a function of the model and the batch, drawing from the framework's own generator.",
                )
            )
            return self.answer(full, self.accumulated(), stochastic=True)
        if self.differ(full, self.full(seed=1)):
            stochastic = True
            if not self.silence():
                return self.by_many_draws()
            full = self.full()
        self.allowed = self.rounding(full)
        accumulated = self.accumulated()
        if self.differ(full, accumulated):
            self.causes += self.find(accumulated)
        return self.answer(full, accumulated, stochastic)

    def rounding(self, full: Any) -> float:
        """What is rounding here, seen by rounding otherwise: a float64 model may compute parts of itself in less."""
        if self.runner.dtype != "float64":
            return self.allowed
        other = self.runner.gradient([self.all[::-1]], seed=0, quiet=self.quiet, scale=0.7)
        seen = compared(full, other)
        floor = floor_of(seen)
        worst = max((p.difference / max(p.full, floor) for p in seen), key=rank)
        return FINE if 30 * worst <= FINE else min(30 * worst, LOOSE) if math.isfinite(worst) else LOOSE

    def full(self, seed: int = 0, quiet: frozenset[str] | None = None) -> Any:
        return self.runner.gradient([self.all], seed=seed, quiet=self.quiet if quiet is None else quiet)

    def accumulated(self, seed: int = 0, quiet: frozenset[str] | None = None, **how: Any) -> Any:
        return self.runner.gradient(self.parts, seed=seed, quiet=self.quiet if quiet is None else quiet, **how)

    def differ(self, one: Any, other: Any) -> bool:
        return bool(differing(compared(one, other), self.allowed))

    def answer(self, full: Any, accumulated: Any, stochastic: bool) -> Audit:
        r = self.runner
        return Audit(
            compared(full, accumulated), self.causes, r.length, r.micro_batch, r.dtype, self.allowed, stochastic
        )

    # Randomness.

    def silence(self) -> bool:
        """Sets the modules that draw random numbers to evaluation mode; returns whether nothing else draws."""
        noisy = tuple(self.runner.sources(self.all, 1, self.quiet))
        resting = self.quiet | set(noisy)
        silent = not self.differ(self.full(quiet=resting), self.full(seed=1, quiet=resting))
        if silent:
            self.quiet = resting
        where = noisy if silent else ()
        draws = f"{', '.join(where)} draw" if len(where) > 1 else f"{where[0]} draws" if where else "The loss draws"
        evidence = f"{draws} random numbers: another seed gives another gradient."
        remedy = (
            "Each micro-batch draws its own, as the examples of the batch do: exact on average. Compared here in "
            "evaluation mode."
            if silent
            else "Exact on average, if nothing else is wrong. Compared here over many draws."
        )
        self.causes.append(Cause("stochastic", where, evidence, remedy))
        return silent

    def by_many_draws(self) -> Audit:
        """Randomness outside modules: do the means over many draws differ by more than their standard error?"""
        draws = 24
        whole, parts = ([one(seed=k) for k in range(draws)] for one in (self.full, self.accumulated))
        means = _mean(whole), _mean(parts)
        found = compared(*means)
        squares = sum(
            p.difference**2
            for several, mean in ((whole, means[0]), (parts, means[1]))
            for one in several
            for p in compared(mean, one)
        )
        # Twice the standard error of the difference of the two means may well be random.
        if sum(p.difference**2 for p in found) > 4 * squares / (draws * (draws - 1)):
            evidence = f"The means over {draws} draws differ by more than twice their standard error."
            self.causes.append(Cause("unknown", (), evidence, "Make the loss deterministic and audit again."))
        else:
            found = [Compared(p.name, p.full, p.accumulated, 0.0) for p in found]
        r = self.runner
        return Audit(found, self.causes, r.length, r.micro_batch, r.dtype, self.allowed, True)

    # Causes that are left once nothing is random.

    def find(self, accumulated: Any) -> list[Cause]:
        if bad := [k for k, rows in enumerate(self.parts) if not math.isfinite(self.loss(rows).loss)]:
            listed = ", ".join(map(str, bad))
            return [
                Cause(
                    "not finite",
                    (),
                    f"The loss of micro-batch {listed} is not finite, though the batch's is.",
                    "A mean over nothing is 0/0: return (loss, items), with the number of tokens or examples that are "
                    "not masked; 0 of them then count for nothing.",
                )
            ]
        if self.differ(accumulated, self.accumulated(fresh=True)):
            return [
                Cause(
                    "state",
                    (),
                    "A micro-batch's gradient depends on those before it: the model keeps something from one forward "
                    "to the next.",
                    "Pass what is kept in with the batch, or reset it in each forward.",
                )
            ]
        causes = []
        if modules := self.runner.sources(self.parts[0], 0, self.quiet):
            causes.append(self.blame(modules))
            resting = self.quiet | set(modules)
            if not self.differ(self.full(quiet=resting), self.accumulated(quiet=resting)):
                return causes
            if self.runner.sources(self.parts[0], 0, resting):
                return causes  # they couple the examples in either mode, and hide what the loss may do
            self.quiet = resting
        return [*causes, self.blame_loss()]

    def blame(self, modules: Sequence[str]) -> Cause:
        resting = self.quiet | set(modules)
        cured = not self.runner.sources(self.parts[0], 0, resting)
        listed = ", ".join(modules)
        evidence = (
            f"An example's output of {listed} depends on the other examples that it is computed with: statistics are "
            "taken over the micro-batch, not over the batch."
        )
        remedy = "Normalize within the example (GroupNorm, LayerNorm)" + (
            ", or keep it in evaluation mode, which was seen to help." if cured else "."
        )
        return Cause("module", tuple(modules), evidence, remedy)

    def loss(self, rows: Examples) -> Run:
        return self.runner.loss(rows, seed=0, quiet=self.quiet)

    def blame_loss(self) -> Cause:
        """What the loss is, if it is not the mean over the items it is said to be the mean of."""
        if (together := self.rows_together()) is not None:
            return together
        forwards, backwards = self.loss(self.all).loss, self.loss(self.all[::-1]).loss
        if abs(forwards - backwards) > self.allowed * max(abs(forwards), abs(backwards)):
            return Cause(
                "order",
                (),
                f"The loss depends on an example's position in the batch: {forwards:.6g}, and {backwards:.6g} with "
                "the examples in reverse.",
                "An example's position in a micro-batch is not its position in the batch: let the loss depend on "
                "examples, not on positions.",
            )
        for first, second in _pairs(self.parts):
            probe = Probe.of(self.loss, first, second, self.allowed)
            if probe is not None and (kind := probe.kind()) is not None:
                return self.explain(kind, probe)
        return Cause(
            "unknown",
            (),
            "The gradients differ, and no experiment showed why.",
            "Try a batch of more, and more different, examples.",
        )

    def rows_together(self) -> Cause | None:
        """Whether the loss compares pairs of rows: those of the batch's two halves, or neighbours."""
        length, pairs = self.runner.length, max(1, self.runner.micro_batch // 2)
        half = length // 2
        if length % 2 or pairs >= half:
            return None
        blocks = [range(i, min(i + pairs, half)) for i in range(0, half, pairs)]
        halves = [[*block, *(half + i for i in block)] for block in blocks]
        neighbours = [[2 * i + k for i in block for k in (0, 1)] for block in blocks]
        full = self.full()
        for parts, rows in ((halves, f"i and i + {half}"), (neighbours, "2i and 2i + 1")):
            if not self.differ(full, self.runner.gradient(parts, seed=0, quiet=self.quiet)):
                return Cause(
                    "coupling",
                    (),
                    f"The batch has rows that belong together: with rows {rows} in the same micro-batch it is "
                    "exact, as was seen. So it is with chosen and rejected answers.",
                    "Cut micro-batches so that they stay together (cut= and length= of bb.backward in PyTorch), or let "
                    "an example hold all of its rows along another dimension.",
                )
        return None

    def explain(self, kind: str, probe: Probe) -> Cause:
        if kind == "sum":
            twice = probe.at(2, 2).loss / probe.at(1, 1).loss
            return Cause(
                "sum",
                (),
                f"The loss, or a part of it, is a sum and not a mean: examples seen twice give {twice:.3g} × the loss. "
                'So it is with reduction="sum", and with a division by a constant.',
                "Divide by the number of items that the micro-batch holds.",
            )
        if kind == "terms":
            return Cause(
                "terms",
                (),
                "The loss has parts that are means over different things, such as tokens and examples: no single count "
                "of items weights both correctly.",
                "Make every part a mean over the same items, or accumulate each part separately.",
            )
        if kind == "coupling":
            return Cause(
                "coupling",
                (),
                "The loss couples examples: what one adds depends on which others are there, as in contrastive, "
                "ranking and load-balancing losses, and where something is normalized over the batch.",
                "No accumulation of gradients can be exact. Compute the loss over the whole batch, from outputs that "
                "bb.chunked makes in pieces, or accept the micro-batch's loss as another loss.",
            )
        evidence = "The loss is a mean, but not over the items that it is said to be the mean of"
        evidence += f": an example counts {probe.weight:.3g} × as much as another." if probe.weight else "."
        remedy = "Return (loss, items), with the number of tokens or examples, unmasked, that the mean is over."
        weights = self.implied_items()
        if weights is not None and not self.differ(self.full(), self.accumulated(items=weights)):
            shown = ", ".join(f"{w:.3g}" for w in weights[:6]) + (", …" if len(weights) > 6 else "")
            remedy += f" With {shown} (relative to the first) for the micro-batches it is exact, as was seen."
        return Cause("items", (), evidence, remedy)

    def implied_items(self) -> list[float] | None:
        """What each micro-batch counts for, relative to the first, read off the loss of two of them together."""
        first, weights = self.parts[0], [1.0]
        one = self.loss(first).loss
        for rows in self.parts[1:]:
            other, both = self.loss(rows).loss, self.loss([*first, *rows]).loss
            if other == one or both == other:
                return None
            weight = (one - both) / (both - other)
            if not (math.isfinite(weight) and weight > 0):
                return None
            weights.append(weight)
        return weights


def _pairs(parts: Sequence[Examples]) -> list[tuple[Examples, Examples]]:
    """Pairs of blocks to probe: different examples, of different sizes where there are enough."""
    rows = [row for part in parts for row in part]
    size = max(1, min(len(parts[0]), len(rows) // 3))
    draw, pairs = random.Random(0), []
    for _ in range(6):
        mixed = draw.sample(rows, len(rows))
        pairs.append((mixed[:size], mixed[size : size + max(1, size - 1)]))
    return [(one, two) for one, two in pairs if two]


def _mean(gradients: list[Any]) -> Any:
    """Of gradients as a package returns them: mappings from names to arrays."""
    return {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]}
