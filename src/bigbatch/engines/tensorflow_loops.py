"""The functions that a graph's operation calls, and how often a loop runs its body."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

# Each step of the simulation takes some 0.1 ms.
MOST_STEPS = 10_000
# A loop's length is computed from a few numbers.
MOST_ELEMENTS = 64


def branches_of(operation: Any) -> tuple[list[str], list[Any]] | None:
    """The names and the graphs of the functions that an operation calls, or None.

    They are a nested tf.function, a conditional's branches, or a loop's "cond" and "body".
    """
    if not any(attr.type in ("func", "list(func)") for attr in operation.op_def.attr):
        return None
    found = []
    for name, attr in operation.node_def.attr.items():
        functions = [attr.func] if attr.HasField("func") else attr.list.func
        # No public function leads from a call to the function that it calls: tests/tensorflow/test_private.py.
        found += [(name, operation.graph._get_function(function.name).graph) for function in functions]
    return ([name for name, _ in found], [graph for _, graph in found]) if found else None


def trips_of(
    inputs: Sequence[Any], condition: Any, body: Any, value: Callable[[Any], Any]
) -> tuple[int | None, dict[int, Any]]:
    """How often a loop runs its body, found by running what its condition reads and nothing else.

    Args:
        inputs: the loop's.
        condition: the graph of the condition.
        body: the graph of the body.
        value: of one of the inputs where that is a constant, else None.

    Returns:
        The number, and what the variables that the condition reads are in the end. (None, {}) where it depends on data.
    """
    goes_on = Slice(condition, {0: condition.outputs[0]})
    needed = goes_on.inputs | {0}  # the loop's counter, which the backward loop runs to
    step = Slice(body, {i: body.outputs[i] for i in needed})
    while not step.inputs <= needed:
        needed |= step.inputs
        step = Slice(body, {i: body.outputs[i] for i in needed})
    state = {i: value(inputs[i]) for i in needed}
    if not (goes_on.is_pure and step.is_pure) or any(known is None for known in state.values()):
        return None, {}
    with goes_on.session(), step.session():
        for times in range(MOST_STEPS):
            if not goes_on.run(state)[0]:
                return times, state
            state = step.run(state)
    return None, {}


class Slice:
    """What some of a graph's tensors are computed from. `inputs` are the numbers of the graph's inputs among that."""

    def __init__(self, graph: Any, tensors: dict[int, Any]):
        self.graph, self.tensors = graph, tensors
        self.inputs: set[int] = set()
        self.is_pure = True  # depends on neither random numbers nor state
        self._constants: dict[str, Any] = {}
        self._operations: set[str] = set()
        places = {tensor.ref(): i for i, tensor in enumerate(graph.inputs)}
        seen, stack = set(), list(tensors.values())
        while stack:
            tensor = stack.pop()
            if tensor.ref() in seen:
                continue
            seen.add(tensor.ref())
            if tensor.ref() in places:
                self.inputs.add(places[tensor.ref()])
            elif (known := constant(tensor)) is not None:
                self._constants[tensor.name] = known
            else:
                self.is_pure &= not tensor.op.op_def.is_stateful and tensor.op.type != "Placeholder"
                self._operations.add(tensor.op.name)
                stack.extend(tensor.op.inputs)

    def session(self) -> tf.compat.v1.Session:
        """Where it can be run, on the CPU, and without its control inputs: they lead to the rest of the graph."""
        part = self.graph.as_graph_def()
        nodes = [node for node in part.node if node.name in self._operations]
        for node in nodes:
            node.input[:] = [name for name in node.input if not name.startswith("^")]
        reads = {name if ":" in name else f"{name}:0" for node in nodes for name in node.input}
        del part.node[:]
        part.node.extend(nodes)
        leaves = {self.graph.inputs[i].name: self.graph.inputs[i].dtype for i in self.inputs}
        leaves |= {name: tf.as_dtype(value.dtype) for name, value in self._constants.items()}
        with tf.Graph().as_default() as alone:
            self._fed = {name: tf.compat.v1.placeholder(dtype) for name, dtype in leaves.items()}
            inside = [tensor.name for tensor in self.tensors.values() if tensor.name not in leaves]
            read = {name: fed for name, fed in self._fed.items() if name in reads}
            made = tf.import_graph_def(part, input_map=read, return_elements=inside, name="")
        self._fetched = dict(zip(inside, made, strict=True)) | self._fed
        config = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
        self._session = tf.compat.v1.Session(graph=alone, config=config)
        return self._session

    def run(self, values: dict[int, Any]) -> dict[int, Any]:
        """The tensors, from values of the inputs."""
        given = {self.graph.inputs[i].name: values[i] for i in self.inputs} | self._constants
        fed = {self._fed[name].name: value for name, value in given.items()}
        return self._session.run({i: self._fetched[tensor.name] for i, tensor in self.tensors.items()}, fed)


def constant(tensor: Any) -> Any:
    """A small constant's value, or None."""
    if not tensor.shape.is_fully_defined() or tensor.shape.num_elements() > MOST_ELEMENTS:
        return None
    return tf.get_static_value(tensor)
