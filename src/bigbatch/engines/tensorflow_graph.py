"""What a traced graph needs: its tensors' lives, read off in the order in which its operations were made."""

import math
from typing import Any

import tensorflow as tf

from bigbatch import host

# The part of what is free that is left alone: the graph tells no more than the order it was written in.
RESERVE = 0.25

# What hands on its input's memory, and what writes into it where nobody else needs it any more.
SAME = {"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient", "ReadVariableOp",
        "EnsureShape", "CheckNumerics"}  # fmt: skip
IN_PLACE = {"Add", "AddV2", "AddN", "BiasAdd", "Sub", "Mul", "RealDiv", "Div", "Maximum", "Minimum", "Neg", "Square",
            "Sqrt", "Rsqrt", "Exp", "Log", "Relu", "Relu6", "Elu", "Selu", "Tanh", "Sigmoid", "Softplus", "Softmax",
            "LogSoftmax", "Pow", "Erf", "Erfc", "Floor", "Abs", "TanhGrad", "SigmoidGrad", "ReluGrad", "SoftplusGrad",
            "SelectV2", "GreaterEqual", "DivNoNan"}  # fmt: skip


def peak(graph: Any) -> int:
    """The most bytes that a graph's tensors hold at once beside what it is given, run in the order it was written."""
    operations = graph.get_operations()
    root: dict[Any, Any] = {}  # of each tensor the one whose memory it has
    last: dict[Any, int] = {}  # the last operation that reads it
    for i, operation in enumerate(operations):
        for used in operation.inputs:
            last[root[used.ref()]] = i
        for output in operation.outputs:
            own = output.ref()
            root[own] = root[operation.inputs[0].ref()] if operation.type in SAME and operation.inputs else own
            last.setdefault(root[own], i)
    last.update({root[output.ref()]: len(operations) for output in graph.outputs})
    dying: dict[int, list[Any]] = {}
    for tensor, i in last.items():
        dying.setdefault(i, []).append(tensor)

    live: dict[Any, int] = {}
    now = most = 0
    for i, operation in enumerate(operations):
        before = now
        free = [tensor for tensor in dying.get(i, ()) if tensor in live]
        for output in operation.outputs:
            if root[output.ref()] != output.ref() or operation.type in ("Placeholder", "Const"):
                continue
            size = bytes_of(output.shape, output.dtype)
            taken = next((t for t in free if live[t] == size), None) if operation.type in IN_PLACE else None
            if taken is not None:
                free.remove(taken)
                now -= live.pop(taken)
            live[output.ref()] = size
            now += size
        # What an operation calls makes its outputs as well.
        most = max(most, now, before + sum(map(peak, _called(operation))))
        for tensor in dying.get(i, ()):
            now -= live.pop(tensor, 0)
    return most


def _called(operation: Any) -> list[Any]:
    """The graphs of the functions that an operation calls, such as a nested tf.function or a loop's body."""
    names = [attr.func.name for attr in operation.node_def.attr.values() if attr.HasField("func")]
    # Nothing public leads from a call to what it calls. tests/tensorflow/test_memory.py fails when this moves.
    return [operation.graph._get_function(name).graph for name in names]


def bytes_of(shape: Any, dtype: tf.DType) -> int:
    """Of a dense tensor; a dimension that only the run will tell counts as 1, and a handle as nothing."""
    if dtype in (tf.resource, tf.variant) or tf.TensorShape(shape).rank is None:
        return 0
    return math.prod(n or 1 for n in tf.TensorShape(shape).as_list()) * dtype.size


def device_memory(memory: Any) -> host.Memory:
    """Of the first GPU where there is one, which says what is held but not what is free; else the machine's."""
    if not tf.config.list_logical_devices("GPU"):
        return host.memory()
    if not isinstance(memory, str | int):
        raise NotImplementedError(
            "TensorFlow does not say how much memory a GPU has left. "
            "Pass memory as a size to plan, such as '8GiB', and micro_batch as a number."
        )
    return host.Memory(tf.config.experimental.get_memory_info("GPU:0")["current"], 1 << 62, "the GPU")
