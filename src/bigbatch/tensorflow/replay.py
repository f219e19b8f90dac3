"""What a function does beside returning tensors, and running it once more as it ran before.

A first trace shows which variables it reads and writes, and which tensors it takes from outside. Random numbers come
from seeds in variables (Keras's layers, `tf.random.Generator`) or from arguments (`tf.random.stateless_*`), so that the
values of the written variables are all that a second run needs.
"""

import functools
import types
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch.engines.captures import closed_over, named_globals
from bigbatch.engines.tensorflow_writes import written
from bigbatch.engines.tensorflow_xla import under_xla


class Effects(NamedTuple):
    """What one trace of a function showed."""

    read: list[tf.Variable]  # and not written
    written: list[tf.Variable]
    outside: list[tf.Tensor]  # of a floating type, that may have a gradient


def effects_of(function: Any, concrete: Any) -> Effects:
    """Of a function and its graph.

    Raises:
        ValueError: it draws random numbers that nothing can draw again, or cannot be run again under XLA.
    """
    if drawing := next(_drawing(concrete.graph), None):
        raise ValueError(
            "A chunked function must draw the same random numbers when it runs again, and nothing repeats those of "
            f"tf.random. Received: an operation {drawing}. Draw from a tf.random.Generator, from tf.random.stateless_* "
            "with a seed among the arguments, or in a Keras layer."
        )
    handles = {id(handle) for handle in written(concrete.graph)}
    variables = list(concrete.graph.variables)
    changed = [v for v in variables if id(v.handle) in handles]
    if changed and under_xla():
        raise ValueError(
            "A chunked function that writes to variables, as a BatchNormalization or a Dropout does, cannot run again "
            f"under XLA. Received: {changed[0].name}. Leave jit_compile=True out, or call it with training=False."
        )
    outside = [outer for outer, _ in concrete.graph.captures if outer.dtype.is_floating]
    if tf.executing_eagerly():  # where the function may name another tensor at each call
        outside += [x for x in _named(function) if tf.is_tensor(x) and not isinstance(x, tf.Variable)]
    unique = {id(x): x for x in outside if x.dtype.is_floating}
    return Effects([v for v in variables if id(v.handle) not in handles], changed, list(unique.values()))


def _drawing(graph: Any) -> Iterator[str]:
    """The operations that draw random numbers from a state of their own, in the functions that it calls too."""
    definition = graph.as_graph_def()
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    for node in nodes:
        # All of these, and no others, have two seeds as attributes.
        if "seed" in node.attr and "seed2" in node.attr:
            yield f"{node.op} ({node.name})"


def _named(function: Any) -> Iterator[Any]:
    """The values that a function closes over, or names among its globals and defaults."""
    if isinstance(function, functools.partial):
        yield from (*function.args, *function.keywords.values())
        yield from _named(function.func)
    elif isinstance(function, types.MethodType):
        yield from _named(function.__func__)
    elif isinstance(function, types.FunctionType):
        yield from (*closed_over(function), *named_globals(function), *(function.__defaults__ or ()))


class Again:
    """A traced function that is run again, on variables of its own in the place of those that it writes to.

    So no variable of the user's moves a second time, whatever runs beside it: a graph that TensorFlow derives to
    differentiate a tf.function orders no assignments. They are bare resources: a tf.function lets nobody make a
    tf.Variable after its first call.
    """

    def __init__(self, concrete: Any, variables: list[tf.Variable]):
        self.concrete = concrete
        with tf.init_scope():
            self.own = [
                tf.raw_ops.VarHandleOp(dtype=v.dtype, shape=v.shape, shared_name=f"bigbatch/{uuid.uuid4()}")
                for v in variables
            ]
        weakref.finalize(self, _free, self.own).atexit = False
        handles = {id(v.handle): own for v, own in zip(variables, self.own, strict=True)}
        self.captured = [handles.get(id(x), x) for x in concrete.captured_inputs]

    def __call__(self, inputs: list[tf.Tensor], state: list[tf.Tensor], after: Any) -> list[tf.Tensor]:
        """The flat outputs, from these values of the variables, and once `after` is there."""
        with tf.control_dependencies(tf.nest.flatten(after, expand_composites=True)):
            assigned = [
                tf.raw_ops.AssignVariableOp(resource=own, value=value)
                for own, value in zip(self.own, state, strict=True)
            ]
        with tf.control_dependencies(assigned):
            types = [y.dtype for y in self.concrete.outputs]
            return list(tf.raw_ops.StatefulPartitionedCall(args=[*inputs, *self.captured], Tout=types, f=self.concrete))


def _free(handles: list[tf.Tensor]) -> None:
    with tf.init_scope():
        for handle in handles:
            tf.raw_ops.DestroyResourceOp(resource=handle, ignore_lookup_error=True)


def refusing_another(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of tensors, which cannot be differentiated."""

    @tf.custom_gradient
    def once(*tensors: tf.Tensor) -> Any:
        def refuse(*_: Any, variables: Any = None) -> Any:
            raise NotImplementedError(
                "The gradient of a chunked function cannot be differentiated again. Take higher derivatives of the "
                "function itself, on a batch that fits."
            )

        return work(*tensors), refuse

    return once
