"""A chunked function's call: how it is cut, one of its pieces, and a piece's gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_xla import under_xla
from bigbatch.tensorflow.batch import spec_of
from bigbatch.tensorflow.checks import widened
from bigbatch.tensorflow.window import wide


class Call(NamedTuple):
    """A function, and how its arguments are cut."""

    function: Any
    nested: Callable[[list[Any]], Any]  # (args, kwargs) with these tensors in their places
    is_cut: list[bool]  # for each tensor, along its first axis; the others go to every piece whole
    size: int  # of a piece, in examples
    keep: int
    dtype: Any  # the narrowest in which gradients add up, or None

    def run(self, tensors: list[Any]) -> Any:
        """A piece's outputs, checked."""
        args, kwargs = self.nested(tensors)
        outputs = self.function(*args, **kwargs)
        length = next(x for x, cut in zip(tensors, self.is_cut, strict=True) if cut).shape[0]
        for k, y in enumerate(tf.nest.flatten(outputs)):
            where = "output" if tf.is_tensor(outputs) else f"output {k}"
            if not isinstance(y, tf.Tensor) or y.dtype.is_complex:
                raise TypeError(f"A chunked function must return real tensors. {errors.received(where, y)}")
            if y.shape.rank == 0 or (length is not None and y.shape.rank and y.shape[0] not in (length, None)):
                raise errors.output_without_length(where, y, self.size if length is None else length)
        return outputs

    def piece(self, tensors: list[tf.Tensor], start: Any, size: Any) -> list[tf.Tensor]:
        """What the piece with the examples from `start` on is given."""
        return [_slice(x, start, size) if cut else x for x, cut in zip(tensors, self.is_cut, strict=True)]

    def specs(self, tensors: list[tf.Tensor], size: Any) -> list[tf.TensorSpec]:
        """Of a piece's tensors."""
        pairs = zip(tensors, self.is_cut, strict=True)
        return [spec_of(x, size) if cut else tf.TensorSpec(x.shape, x.dtype) for x, cut in pairs]

    def sources(self, tensors: list[Any]) -> tuple[list[Any], list[Any]]:
        """Those of a floating type among a piece's tensors: what is whole, and what is cut."""
        pairs = [(x, cut) for x, cut in zip(tensors, self.is_cut, strict=True) if x.dtype.is_floating]
        return [x for x, cut in pairs if not cut], [x for x, cut in pairs if cut]

    def nest(self, tensors: list[Any], whole: list[Any], cut: list[Any]) -> list[Any]:
        """A gradient for each tensor, None for one that is not of a floating type; the inverse of `sources`."""
        following = {False: iter(whole), True: iter(cut)}
        pairs = zip(tensors, self.is_cut, strict=True)
        return [next(following[is_cut]) if x.dtype.is_floating else None for x, is_cut in pairs]


class Recorded(NamedTuple):
    """A piece that ran under a tape of its own."""

    tape: tf.GradientTape
    outputs: list[tf.Tensor]
    summed: list[Any]  # the outside tensors and whole arguments
    cut: list[Any]

    @classmethod
    def of(cls, call: Call, piece: list[Any], outside: list[Any], persistent: bool = False) -> "Recorded":
        """Runs a piece, given these tensors; `persistent` where its gradient may be asked for more than once."""
        whole, cut = call.sources(piece)
        with tf.GradientTape(persistent=persistent) as tape:
            tape.watch([*outside, *whole, *cut])
            outputs = tf.nest.flatten(call.run(piece))
        return cls(tape, outputs, [*outside, *whole], cut)

    def gradients(self, dys: list[Any], variables: list[Any], dtype: Any) -> tuple[list[Any], list[Any]]:
        """Of what adds up over the pieces, variables first, in the dtype to add up in; and of what is cut.

        Args:
            dys: the gradients of those outputs that are of a floating type.
            variables: in whose order the first ones are.
            dtype: the narrowest to add up in, or None.
        """
        summed = [*variables, *self.summed]
        outputs = [y for y in self.outputs if y.dtype.is_floating]
        grads = self.tape.gradient(outputs, [*summed, *self.cut], output_gradients=dys)
        wides = [wide(g, None, widened(x.dtype, dtype)) for g, x in zip(grads, summed, strict=False)]
        pairs = zip(grads[len(summed) :], self.cut, strict=True)
        return wides, [tf.zeros_like(x) if g is None else tf.convert_to_tensor(g) for g, x in pairs]


def _slice(x: tf.Tensor, start: Any, size: Any) -> tf.Tensor:
    if isinstance(start, int) and isinstance(size, int):
        return x[start : start + size]
    rest = tf.shape(x)[1:]
    part = tf.slice(x, tf.concat([[start], tf.zeros_like(rest)], 0), tf.concat([[size], rest], 0))
    return tf.ensure_shape(part, tf.TensorShape([size if isinstance(size, int) else None]).concatenate(x.shape[1:]))


def traced(work: Callable[..., Any], *specs: Any) -> Any:
    """The graph of a function of tensors. An error of ours is raised as it is, without AutoGraph's preface."""
    refused: list[Exception] = []

    def noting(*given: Any) -> Any:
        try:
            return work(*given)
        except (TypeError, ValueError, NotImplementedError) as error:
            refused.append(error)
            raise

    try:
        return tf.function(noting).get_concrete_function(*specs)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise (refused or [error])[0] from None


MOVED = (
    "A variable of a chunked function was written to between its forward and its backward, so that its pieces cannot "
    "run again as they ran. Step the optimizer, and assign to variables, after the gradient was taken."
)


def can_be_compared() -> bool:
    """Whether variables can be compared with what they were; XLA makes no such checks."""
    return not under_xla()
