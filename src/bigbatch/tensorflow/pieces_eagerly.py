"""A chunked function's pieces outside of a `tf.function`: two loops that a debugger can step through."""

from typing import Any

import tensorflow as tf

from bigbatch.tensorflow.guard import bits_of
from bigbatch.tensorflow.pieces import MOVED, Call, Recorded
from bigbatch.tensorflow.replay import Effects, effects_of
from bigbatch.tensorflow.window import add, mean


class Eagerly:
    """One call."""

    def __init__(self, call: Call, length: int, concrete: Any):
        self.call, self.structure = call, concrete.structured_outputs
        self.effects: Effects = effects_of(call.function, concrete)
        self.starts = range(0, length, call.size)
        self.kept_from = max(0, len(self.starts) - call.keep)

    def forward(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """The flat outputs, joined."""
        self.given, self.bits = tensors, bits_of(self.effects.read)

        def run() -> list[Any]:
            made = []
            for start in self.starts[: self.kept_from]:
                state = [v.read_value() for v in self.effects.written]
                made.append((state, tf.nest.flatten(self.call.run(self._piece(start)))))
            return made

        # What recompute_grad runs no tape records: nothing else public does that for tapes that are not ours.
        made = tf.recompute_grad(run)() if self.kept_from else []
        self.states = [state for state, _ in made]
        kept = [self._recorded(start, persistent=True) for start in self.starts[self.kept_from :]]
        self.kept = dict(enumerate(kept, self.kept_from))
        parts = [outputs for _, outputs in made] + [piece.outputs for piece in kept]
        return [tf.concat(of_one, 0) for of_one in zip(*parts, strict=True)]

    def backward(self, dys: list[tf.Tensor], variables: list[Any]) -> tuple[list[Any], list[Any]]:
        """The gradients of the tensors and of the variables, from those of the floating outputs."""
        if not bool(tf.reduce_all(tf.equal(self.bits, bits_of(self.effects.read)))):
            raise RuntimeError(MOVED)
        written = self.effects.written
        now = [v.read_value() for v in written]
        whole, cut = self.call.sources(self.given)
        summed = [*variables, *self.effects.outside, *whole]
        sums, parts = [None] * len(summed), [[] for _ in cut]
        try:
            for k, start in enumerate(self.starts):
                for v, value in zip(written, self.states[k] if k not in self.kept else [], strict=k not in self.kept):
                    v.assign(value)
                piece = self.kept.get(k) or self._recorded(start)
                of_piece = [dy[start : start + self.call.size] for dy in dys]
                gradients, of_cut = piece.gradients(of_piece, variables, self.call.dtype)
                sums = [add(g, h) for g, h in zip(sums, gradients, strict=True)]
                parts = [[*before, g] for before, g in zip(parts, of_cut, strict=True)]
        finally:
            for v, value in zip(written, now, strict=True):
                v.assign(value)
        one = tf.ones(())
        means = [mean(g, one, x) for g, x in zip(sums, summed, strict=True)]
        count = len(variables), len(summed) - len(whole)
        of_tensors = self.call.nest(self.given, means[count[1] :], [tf.concat(of_one, 0) for of_one in parts])
        return [*of_tensors, *means[count[0] : count[1]]], means[: count[0]]

    def _piece(self, start: int) -> list[tf.Tensor]:
        size = min(self.call.size, self.starts.stop - start)
        return self.call.piece(self.given, start, size)

    def _recorded(self, start: int, persistent: bool = False) -> Recorded:
        return Recorded.of(self.call, self._piece(start), self.effects.outside, persistent)
