"""`chunked`: a function of a whole batch, run one micro-batch at a time, and once more when its gradient is needed.

A loss that compares the examples of a batch needs all of their outputs, and no micro-batch has them. So the function
runs piece by piece, its outputs are joined, and the loss sees the whole batch. To a `tf.GradientTape` all pieces are
one operation, which keeps its inputs; each piece runs again for its gradients. In memory are the inputs, the outputs
and one piece. This is GradCache (Gao et al. 2021, arXiv:2101.06983) behind a call.
"""

import functools
import logging
import time as clock
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import tensorflow as tf

from bigbatch import errors
from bigbatch.engines.tensorflow_estimate import RESERVE, bytes_of, device_memory, peak
from bigbatch.plan import budget, choose, log_choice
from bigbatch.tensorflow.batch import leaves_of, length_of, with_text
from bigbatch.tensorflow.checks import check_dtype
from bigbatch.tensorflow.pieces import Call, traced
from bigbatch.tensorflow.pieces_eagerly import Eagerly
from bigbatch.tensorflow.pieces_in_graph import Back, InGraph
from bigbatch.tensorflow.replay import effects_of, refusing_another

logger = logging.getLogger("bigbatch.tensorflow")


def chunked(
    function: Callable[..., Any],
    *,
    micro_batch: int | Literal["auto"],
    in_axes: int | Sequence[int | None] = 0,
    keep: int = 0,
    dtype: Any = tf.float32,
) -> Callable[..., Any]:
    """A function with the same values and gradients that holds the activations of `micro_batch` examples at a time.

    It is called as the model is, under a `tf.GradientTape`. An example's output must depend on that example only; the
    loss that follows may compare them all::

        encode = bb.chunked(model, micro_batch=32)
        with tf.GradientTape() as tape:
            loss = info_nce(encode(images, training=True), encode(texts, training=True))  # 4,096 pairs, 32 in memory
        grads = tape.gradient(loss, model.trainable_variables)

    It takes one more forward pass than `function`. That draws the same random numbers, and the variables that
    `function` writes to, such as a BatchNormalization's averages, change once. Random numbers must come from Keras's
    layers, a `tf.random.Generator` or `tf.random.stateless_*`.

    Args:
        function: a model or a function of tensors. It is traced, also outside a `tf.function`, to see what it reads and
            writes. Variables that it reads get their gradients, and so do tensors that it closes over.
        micro_batch: examples in memory at once; the last piece may be shorter. "auto" predicts from the traced graph
            of a piece's gradients what fits, and takes the largest.
        in_axes: the axis along which positional arguments are cut, or one entry for each of them: an axis, or None for
            one that every piece gets whole. Tensors among the keyword arguments are cut along their first axis.
            Whatever is no tensor, such as `training=True`, goes to every piece.
        keep: how many pieces keep their activations, so that these do not run again: the last ones. In a `tf.function`
            each stands in the graph by itself.
        dtype: the narrowest dtype in which the gradients of variables and of whole arguments add up over the pieces.
            None for their own.

    Returns:
        A function with the arguments of `function`. Its outputs are nested as `function`'s are, joined along their
        leading dimension. Its gradient cannot be differentiated again.

    Raises:
        TypeError, ValueError: an option is not as described; or, when called, an argument or an output; or the function
            draws random numbers that cannot be drawn again.
        RuntimeError: a variable was written to between the forward and the backward; in a `tf.function`
            `tf.errors.InvalidArgumentError`. It is not seen on a GPU and under XLA.
    """
    if not callable(function):
        raise TypeError(f"function must be a model or a function. {errors.received('function', function)}")
    if not (isinstance(micro_batch, str) and micro_batch == "auto"):
        micro_batch = errors.check_micro_batch(micro_batch)
    errors.check_keep(keep, auto=False)
    check_dtype(dtype)
    _check_in_axes(in_axes)
    known: dict[Any, Any] = {}  # what traces have shown, by the arguments' shapes

    def run(*args: Any, **kwargs: Any) -> Any:
        given = _Given.of(args, kwargs, in_axes)
        length = length_of([x for x, is_cut in zip(given.tensors, given.is_cut, strict=True) if is_cut])
        size = micro_batch
        call = Call(function, given.nested, given.is_cut, 0, keep, dtype)
        if size == "auto":
            key = "auto", given.key()
            if key not in known:
                known[key] = _planned(call, given.tensors, length)
            size = known[key]
        if isinstance(length, int) and length <= size:
            return function(*args, **kwargs)
        call = call._replace(size=size)
        if not tf.executing_eagerly():
            return _differentiable(InGraph(call, given.tensors, length), given.tensors)
        if (key := (size, given.key())) not in known:
            known[key] = traced(lambda *x: call.run(list(x)), *call.specs(given.tensors, size))
        return _differentiable(Eagerly(call, length, known[key]), given.tensors)

    functools.update_wrapper(run, function, updated=())
    del run.__dict__["__wrapped__"]  # AutoGraph would call that in its place
    return tf.autograph.experimental.do_not_convert(run)


class _Given(NamedTuple):
    """A call's arguments: their tensors, those that are cut with the examples first, and all else."""

    tensors: list[tf.Tensor]
    axes: list[int | None]
    flat: list[Any]  # the leaves of (args, kwargs), with None for a tensor
    places: list[int]  # of the tensors among them
    nesting: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], in_axes: Any) -> "_Given":
        """Finds the tensors, and transposes those whose examples do not lie along the first axis."""
        args, kwargs = with_text(args), with_text(kwargs)
        axes = [in_axes] * len(args) if isinstance(in_axes, int) else list(in_axes)
        if len(axes) != len(args):
            raise _bad_in_axes(in_axes, f" There are {len(args)} positional arguments.")
        named = [(f"args[{k}]", arg, axis) for k, (arg, axis) in enumerate(zip(args, axes, strict=True))]
        named += [(name, kwargs[name], 0) for name in sorted(kwargs)]
        given = cls([], [], tf.nest.flatten((args, kwargs)), [], (args, kwargs))
        leaves = iter((leaf, axis) for where, value, axis in named for leaf in leaves_of(value, where))
        for k, value in enumerate(given.flat):
            (where, _), axis = next(leaves) if value is not None else (("", None), None)
            if isinstance(value, tf.RaggedTensor | tf.SparseTensor):
                raise TypeError(f"An argument must hold dense tensors. {errors.received(where, value)}")
            if not _is_array(value):
                continue
            value = tf.convert_to_tensor(cast("Any", value))
            if axis is not None and value.shape.rank is not None and not -value.shape.rank <= axis < value.shape.rank:
                raise errors.leaf_without_length(where, value)
            given.tensors.append(_moved(value, axis or 0, 0))
            given.axes.append(axis)
            given.places.append(k)
            given.flat[k] = None
        return given

    @property
    def is_cut(self) -> list[bool]:
        """For each tensor."""
        return [axis is not None for axis in self.axes]

    def nested(self, tensors: list[Any]) -> Any:
        """(args, kwargs) with other tensors, the examples where they were."""
        flat = list(self.flat)
        for k, x, axis in zip(self.places, tensors, self.axes, strict=True):
            flat[k] = _moved(x, 0, axis or 0)
        return tf.nest.pack_sequence_as(self.nesting, flat)

    def key(self) -> Any:
        """What a trace depends on."""
        shapes = tuple((tuple(x.shape), x.dtype) for x in self.tensors)
        return shapes, tuple(self.axes), tuple(self.places), repr(self.flat)


def _is_array(value: Any) -> bool:
    return tf.is_tensor(value) or isinstance(value, np.ndarray) or hasattr(value, "__array__")


def _moved(x: tf.Tensor, start: int, stop: int) -> tf.Tensor:
    """With one axis in another place."""
    if start == stop or x.shape.rank is None:
        return x
    order = list(range(x.shape.rank))
    order.insert(stop % x.shape.rank, order.pop(start))
    return tf.transpose(x, order)


def _check_in_axes(in_axes: Any) -> None:
    entries = in_axes if isinstance(in_axes, tuple | list) else [in_axes]
    none = in_axes is None or any(isinstance(a, bool) or not (a is None or isinstance(a, int)) for a in entries)
    if none or all(a is None for a in entries):
        raise _bad_in_axes(in_axes)


def _bad_in_axes(in_axes: Any, more: str = "") -> Exception:
    return ValueError(
        "in_axes must be an integer, or have one entry for each positional argument: the axis that holds its examples, "
        f"or None for an argument that every piece gets whole. {errors.received('in_axes', in_axes)}{more}"
    )


def _differentiable(pieces: Any, tensors: list[tf.Tensor]) -> Any:
    """The outputs, with the second run as their gradient."""
    given, outside = len(tensors), pieces.effects.outside

    @tf.custom_gradient
    def call(*sources: tf.Tensor) -> Any:
        outputs = pieces.forward(list(sources[:given]))

        def gradient(*dys: Any, variables: Any = ()) -> Any:
            trained = [v for v in variables if v.trainable]
            floating = [
                tf.zeros_like(y) if dy is None else tf.convert_to_tensor(dy)
                for y, dy in zip(outputs, dys, strict=True)
                if y.dtype.is_floating
            ]
            found: Any = None

            def work(*_: tf.Tensor) -> list[tf.Tensor]:
                nonlocal found
                found = pieces.backward(floating, trained)
                return tf.nest.flatten([g for of_kind in found for g in of_kind if g is not None], True)

            flat = iter(refusing_another(work)(*sources, *floating))
            of_sources, of_trained = (
                [g if g is None else tf.nest.pack_sequence_as(g, [next(flat) for _ in _parts(g)], True) for g in kind]
                for kind in found
            )
            of_variables = {id(v): g for v, g in zip(trained, of_trained, strict=True)}
            all_sources = list(of_sources)
            return (all_sources, [of_variables.get(id(v)) for v in variables]) if variables else all_sources

        return outputs, gradient

    return tf.nest.pack_sequence_as(pieces.structure, tf.nest.flatten(call(*tensors, *outside)))


def _parts(gradient: Any) -> list[Any]:
    return tf.nest.flatten(gradient, expand_composites=True)


def _planned(call: Call, tensors: list[tf.Tensor], length: Any) -> int:
    """The largest micro-batch whose gradients fit what is free, beside all outputs and gradients."""
    if not isinstance(length, int):
        raise ValueError(
            "A plan needs the batch's length while the graph is built. Received: a batch of unknown length. "
            "Give the tf.function an input_signature that says it, or pass micro_batch as a number."
        )
    started = clock.perf_counter()

    def sizes(specs: Sequence[Any]) -> int:
        return sum(bytes_of(x.shape, tf.as_dtype(x.dtype)) for x in specs)

    def step(size: int) -> Any:
        return traced(lambda *x: call.run(list(x)), *call.specs(tensors, size))

    def needs(size: int) -> int:
        concrete = step(size)
        specs = call.specs(tensors, size)
        dys = [tf.TensorSpec(y.shape, y.dtype) for y in concrete.outputs if y.dtype.is_floating]
        back = Back(call, effects_of(call.function, concrete), [*specs, *dys], list(concrete.graph.trainable_variables))
        cut = [x for x, is_cut in zip(specs, call.is_cut, strict=True) if is_cut]
        return sizes(cut) + peak(back.again.concrete.graph)

    whole = step(length)
    kept = 2 * sizes(whole.outputs) + sizes(tensors) + 2 * sizes(whole.graph.trainable_variables)
    memory = device_memory(None)
    allowed = budget(None, memory._replace(free=max(0, memory.free - kept)), reserve=RESERVE)
    plan = choose(needs, length, allowed, lambda: "predicted from the traced graph, beside all outputs and gradients")
    log_choice(logger, plan, started)
    return plan.micro_batch
