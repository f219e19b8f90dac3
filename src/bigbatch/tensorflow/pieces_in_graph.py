"""A chunked function's pieces inside a `tf.function`: two `tf.while_loop`s over them.

The second, for the gradients, is the split API's loop, with all that makes that one fast. Pieces that are kept,
the last ones, and a shorter last one stand outside of the loops.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.engines.tensorflow_ordering import loop
from bigbatch.tensorflow.checks import require
from bigbatch.tensorflow.guard import bits_of
from bigbatch.tensorflow.pieces import MOVED, Call, Recorded, can_be_compared, traced
from bigbatch.tensorflow.replay import Again, Effects, effects_of
from bigbatch.tensorflow.window import add, empty_sums, fused, mean


class Sums(NamedTuple):
    """The gradients of the pieces so far, or of one piece."""

    gradients: list[Any]  # of what adds up over the pieces; without those that are missing
    unit: tf.Tensor  # there once the piece before has run
    cut: list[Any]  # of what is cut: TensorArrays, one entry a piece; of one piece, tensors
    at: tf.Tensor  # the piece's index


class InGraph:
    """One call, traced."""

    def __init__(self, call: Call, tensors: list[tf.Tensor], length: Any):
        self.call, self.tensors, self.length = call, tensors, length
        if call.keep and not isinstance(length, int):
            raise ValueError(
                f"keep needs the batch's length while the graph is built. Received: keep={call.keep} and a batch of "
                "unknown length. Leave keep out, or give the tf.function an input_signature that says the length."
            )
        self.full, self.remainder = length // call.size, length % call.size
        last = [] if isinstance(length, int) and not self.remainder else [(self.full * call.size, self.remainder)]
        kept = min(max(0, call.keep - len(last)), self.full) if call.keep else 0
        self.full -= kept
        starts = [((self.full + k) * call.size, call.size) for k in range(kept)]
        self.singles = [*starts, *last]
        self.kept_from = len(self.singles) - call.keep  # among the singles
        self.backs: list[Back] = []  # whose variables must live as long as the graph
        self.step = self._traced_step(call.size)
        self.structure = self.step.structured_outputs
        self.like = tf.nest.flatten(self.structure)  # a tape outside of this one adds to the graph's own outputs
        self.effects: Effects = effects_of(call.function, self.step)

    def _traced_step(self, size: int | None) -> Any:
        def step(*tensors: tf.Tensor) -> Any:
            return self.call.run(list(tensors))

        return traced(step, *self.call.specs(self.tensors, size))

    def forward(self, tensors: list[tf.Tensor]) -> list[tf.Tensor]:
        """The flat outputs, joined."""
        self.given = tensors
        self.bits = bits_of(self.effects.read) if can_be_compared() else None
        self.states, self.single_states, self.recorded = [], [], {}
        parts = self._forward_loop(tensors) if self.in_loop else [[] for _ in self.like]
        for k, (start, count) in enumerate(self.singles):
            self.single_states.append([v.read_value() for v in self.effects.written])
            with tf.control_dependencies(self.single_states[-1]):
                made = self._single(k, self.call.piece(tensors, start, count))
            parts = [[*before, y] for before, y in zip(parts, made, strict=True)]
        return [tf.concat(of_one, 0) if len(of_one) > 1 else of_one[0] for of_one in parts]

    @property
    def in_loop(self) -> bool:
        """Whether any piece is, as far as the graph knows."""
        return not isinstance(self.full, int) or self.full > 0

    def _forward_loop(self, tensors: list[tf.Tensor]) -> list[list[tf.Tensor]]:
        size, full, written = self.call.size, self.full, self.effects.written

        def body(i: tf.Tensor, arrays: Any) -> Any:
            outputs, states = arrays
            state = [v.read_value() for v in written]
            with tf.control_dependencies(state):
                made = tf.nest.flatten(self.step(*self.call.piece(tensors, i * size, size)))
            outputs = [a.write(i, y) for a, y in zip(outputs, made, strict=True)]
            return i + 1, (outputs, [a.write(i, s) for a, s in zip(states, state, strict=True)])

        like = self.like
        arrays = [_array(y.shape, y.dtype, full) for y in like], [_array(v.shape, v.dtype, full) for v in written]
        outputs, states = loop(body, tf.constant(0), full, arrays)
        self.states = [a.stack() for a in states]
        return [[tf.reshape(a.stack(), [full * size, *_rest(y)])] for a, y in zip(outputs, like, strict=True)]

    def _single(self, k: int, piece: list[tf.Tensor]) -> list[tf.Tensor]:
        if k >= self.kept_from:
            self.recorded[k] = Recorded.of(self.call, piece, self.effects.outside, persistent=True)
            return self.recorded[k].outputs
        count = self.singles[k][1]
        if isinstance(count, int):
            return tf.nest.flatten(self._traced_step(count)(*piece))
        step = self._traced_step(None)
        none = [tf.zeros([0, *_rest(y)], y.dtype) for y in self.like]
        return tf.cond(count > 0, lambda: tf.nest.flatten(step(*piece)), lambda: none)

    def backward(self, dys: list[tf.Tensor], variables: list[Any]) -> tuple[list[Any], list[Any]]:
        """The gradients of the tensors and of the variables, from those of the floating outputs."""
        checks = []
        if self.bits is not None:
            same = tf.reduce_all(tf.equal(self.bits, bits_of(self.effects.read)))
            checks = [require(same, lambda: tf.constant(MOVED))]
        with tf.control_dependencies(checks):
            dys = [tf.identity(dy) for dy in dys]
        whole, _ = self.call.sources(self.given)
        summed = [*variables, *self.effects.outside, *whole]
        none = [None] * len(summed), [[] for _ in self.call.sources(self.given)[1]]
        sums, cut = self._looped(dys, variables, summed) if self.in_loop else none
        for k, (start, count) in enumerate(self.singles):
            sums, cut = self._with_single(k, [_from(dy, start, count) for dy in dys], (sums, cut), variables)
        one = tf.ones(())
        means = [mean(g, one, x) for g, x in zip(sums, summed, strict=True)]
        of_whole = means[len(variables) + len(self.effects.outside) :]
        of_tensors = self.call.nest(self.given, of_whole, [tf.concat(of_one, 0) for of_one in cut])
        return [*of_tensors, *means[len(variables) : len(summed) - len(whole)]], means[: len(variables)]

    def _looped(self, dys: list[Any], variables: list[Any], summed: list[Any]) -> tuple[list[Any], list[list[Any]]]:
        """The sums over the pieces of the loop, and the gradients of what is cut."""
        size, full = self.call.size, self.full
        step = self._back(size, dys, variables)
        given = self.given

        def one(i: tf.Tensor, unit: tf.Tensor) -> Sums:
            piece = self.call.piece(given, i * size, size)
            state = [s[i] for s in self.states]
            gradients, cut = step([*piece, *[_from(dy, i * size, size) for dy in dys]], state, unit)
            with tf.control_dependencies(tf.nest.flatten([gradients, cut], expand_composites=True)):
                unit = tf.identity(tf.constant(0))
            return Sums(gradients, unit, cut, i)

        def joined(a: Sums, b: Sums, add: Callable[[Any, Any], Any] = add) -> Sums:
            gradients = [add(g, h) for g, h in zip(a.gradients, b.gradients, strict=True)]
            return Sums(gradients, b.unit, [x.write(b.at, y) for x, y in zip(a.cut, b.cut, strict=True)], b.at)

        like = Sums(step.gradients, tf.constant(0), step.cut, tf.constant(0))
        shapes = [x.shape for x, there in zip(summed, step.present, strict=True) if there]

        def empty(like: Sums) -> Sums:
            cut = [_array(x.shape, x.dtype, full) for x in like.cut]
            return like._replace(gradients=empty_sums(like.gradients, shapes), cut=cut)

        if fused is None:
            sums = loop(lambda i, w: (i + 1, joined(w, one(i, w.unit))), tf.constant(0), full, empty(like))
        else:
            sums = fused.loop(one, joined, empty, like, full)
        cut = [[tf.reshape(a.stack(), [full * size, *_rest(x)])] for a, x in zip(sums.cut, like.cut, strict=True)]
        return _with_missing(sums.gradients, step.present), cut

    def _with_single(self, k: int, dys: list[Any], before: Any, variables: list[Any]) -> Any:
        """The sums and the gradients of what is cut, with those of a piece outside of the loop."""
        start, count = self.singles[k]

        def both(gradients: list[Any], cut: list[Any]) -> Any:
            sums = [add(g, h) for g, h in zip(before[0], gradients, strict=True)]
            return sums, [[*parts, x] for parts, x in zip(before[1], cut, strict=True)]

        if k in self.recorded:
            return both(*self.recorded[k].gradients(dys, variables, self.call.dtype))
        step = self._back(count if isinstance(count, int) else None, dys, variables)
        given = [*self.call.piece(self.given, start, count), *dys]
        if isinstance(count, int):
            gradients, cut = step(given, self.single_states[k], [])
            return both(_with_missing(gradients, step.present), cut)
        # No conditional returns None: what is missing is missing in every piece.
        present = [g for g, there in zip(before[0], step.present, strict=True) if there]

        def with_it() -> Any:
            gradients, cut = step(given, self.single_states[k], [])
            return [add(g, h) for g, h in zip(present, gradients, strict=True)], cut

        _, inputs = self.call.sources(self.given)
        sums, cut = tf.cond(count > 0, with_it, lambda: (present, [x[:0] for x in inputs]))
        return _with_missing(sums, step.present), [[*parts, x] for parts, x in zip(before[1], cut, strict=True)]

    def _back(self, size: int | None, dys: list[Any], variables: list[Any]) -> "Back":
        specs = self.call.specs(self.given, size)
        specs += [tf.TensorSpec([size, *dy.shape[1:]], dy.dtype) for dy in dys]
        self.backs.append(Back(self.call, self.effects, specs, variables))
        return self.backs[-1]


class Back:
    """A piece's gradients as a graph, which runs the piece again.

    Attributes:
        present: which of the gradients that add up there are.
        gradients: those, as the loop stores them, of any piece.
        cut: the gradients of what is cut, of any piece.
    """

    def __init__(self, call: Call, effects: Effects, specs: list[Any], variables: list[Any]):
        given = len(call.is_cut)
        self.present: list[bool] = []

        def back(*tensors: tf.Tensor) -> tuple[list[Any], list[Any]]:
            piece = Recorded.of(call, list(tensors[:given]), effects.outside)
            gradients, cut = piece.gradients(list(tensors[given:]), variables, call.dtype)
            if fused is not None:
                gradients = fused.stored(gradients, [*variables, *piece.summed])
                gradients = fused.rewritten(gradients, True)
            self.present = [g is not None for g in gradients]
            return [g for g in gradients if g is not None], cut

        concrete = traced(back, *specs)
        self.gradients, self.cut = concrete.structured_outputs
        self.again = Again(concrete, effects.written)

    def __call__(self, tensors: list[tf.Tensor], state: list[tf.Tensor], after: Any) -> tuple[list[Any], list[Any]]:
        """The gradients that there are, and those of what is cut; from these values of the written variables."""
        flat = self.again(tensors, state, after)
        return tf.nest.pack_sequence_as((self.gradients, self.cut), flat, expand_composites=True)


def _with_missing(gradients: list[Any], present: list[bool]) -> list[Any]:
    """One for each source, None for one without."""
    following = iter(gradients)
    return [next(following) if there else None for there in present]


def _array(shape: Any, dtype: Any, count: Any) -> tf.TensorArray:
    return tf.TensorArray(dtype, size=count, element_shape=shape)


def _rest(tensor: Any) -> list[Any]:
    """The dimensions behind the examples', which may be unknown one at most."""
    return [-1 if n is None else n for n in tensor.shape[1:]]


def _from(x: tf.Tensor, start: Any, size: Any) -> tf.Tensor:
    rest = tf.shape(x)[1:]
    return tf.slice(x, tf.concat([[start], tf.zeros_like(rest)], 0), tf.concat([[size], rest], 0))
