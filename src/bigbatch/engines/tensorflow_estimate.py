"""What a traced graph needs: its tensors' lifetimes, read off in the order in which its operations were made."""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from bigbatch import host
from bigbatch.engines.tensorflow_loops import Slice, branches_of, constant, trips_of

# The part of what is free that is left alone: the graph tells no more than the order it was written in.
RESERVE = 0.25

# What hands on its input's memory, and what writes into it where nobody else needs it any more.
SAME = {"Identity", "Reshape", "Squeeze", "ExpandDims", "StopGradient", "PreventGradient", "ReadVariableOp",
        "EnsureShape", "CheckNumerics"}  # fmt: skip
IN_PLACE = {"Add", "AddV2", "AddN", "BiasAdd", "Sub", "Mul", "RealDiv", "Div", "Maximum", "Minimum", "Neg", "Square",
            "Sqrt", "Rsqrt", "Exp", "Log", "Relu", "Relu6", "Elu", "Selu", "Tanh", "Sigmoid", "Softplus", "Softmax",
            "LogSoftmax", "Pow", "Erf", "Erfc", "Floor", "Abs", "TanhGrad", "SigmoidGrad", "ReluGrad", "SoftplusGrad",
            "SelectV2", "GreaterEqual", "DivNoNan"}  # fmt: skip
# What copies a list's elements into one tensor. Whatever else reads a list hands on an element as it is.
COPIES = {"TensorListStack", "TensorListConcat", "TensorListConcatV2", "TensorListGather"}


def peak(graph: Any) -> int:
    """The most bytes that a graph's tensors hold at once beside what it is given, run in the order it was written.

    A loop holds what its body keeps in lists for the backward pass, once for each time that it runs. A loop whose
    length hangs on data counts as run once.
    """
    return Lifetimes(graph, [Given()] * len(graph.inputs)).estimate().peak


class Given(NamedTuple):
    """What is known of an input: the bytes that a list holds, and its value where that is a constant."""

    size: int = 0
    value: Any = None


class Output(NamedTuple):
    """What an output is: the number of the input whose memory it has, if any, and the bytes that it holds."""

    source: int | None
    size: int


class Estimate(NamedTuple):
    """Of one graph."""

    peak: int
    outputs: list[Output]


class Lifetimes:
    """From where to where each tensor of a graph is held.

    Tensors that share memory have one root. A list (a variant tensor) is held as one, and what is put into it is held
    for as long as the list is.
    """

    def __init__(self, graph: Any, given: Sequence[Given]):
        self.graph = graph
        self.operations = _ordered(graph.get_operations())
        self.root: dict[Any, Any] = {}
        self.sizes: dict[Any, int] = {}  # of roots that the graph allocates
        self.lists: dict[Any, int] = {}  # of lists, with everything in them
        self.values: dict[Any, Any] = {}  # of tensors that are constants elsewhere
        self.last: dict[Any, int] = {}  # the last operation that reads a root
        self.kept: dict[tuple[Any, Any], None] = {}  # (root, the list that keeps it), in order
        self.born: list[list[Any]] = [[] for _ in self.operations]  # roots that each operation allocates
        self.inside: list[int] = [0] * len(self.operations)  # bytes that a called function takes meanwhile
        for tensor, known in zip(graph.inputs, given, strict=True):
            own = tensor.ref()
            self.lists[own], self.values[own] = known.size, known.value
        for i, operation in enumerate(self.operations):
            self._read(i, operation)
        end = len(self.operations)
        self.last.update({self.root[output.ref()]: end for output in graph.outputs})
        for root, keeper in reversed(self.kept):  # a list may be in a list
            self.last[root] = max(self.last[root], self.last[keeper])

    def estimate(self) -> Estimate:
        """The peak, and what each output holds."""
        sources = {tensor.ref(): i for i, tensor in enumerate(self.graph.inputs)}
        roots = [self.root[output.ref()] for output in self.graph.outputs]
        outputs = [
            Output(sources.get(root), self._held(root, t)) for root, t in zip(roots, self.graph.outputs, strict=True)
        ]
        return Estimate(self._run(), outputs)

    def value(self, tensor: Any) -> Any:
        """A constant's value, or None."""
        known = self.values.get(tensor.ref())
        return constant(tensor) if known is None else known

    def _computed(self, tensor: Any) -> Any:
        """The value of what is computed from constants alone, or None."""
        known = self.value(tensor)
        if known is not None:
            return known
        whole = Slice(self.graph, {0: tensor})
        values = {i: self.value(self.graph.inputs[i]) for i in whole.inputs}
        if not whole.is_pure or any(value is None for value in values.values()):
            return None
        with whole.session():
            return whole.run(values)[0]

    def _read(self, i: int, operation: Any) -> None:
        for used in operation.inputs:
            self.last[self.root[used.ref()]] = i
        if calls := branches_of(operation):
            self._call(i, operation, *calls)
            return
        lists = [used for used in operation.inputs if used.dtype == tf.variant]
        for output in operation.outputs:
            handed_on = None
            if lists and operation.type not in COPIES:
                handed_on = lists[0]
            elif operation.type in SAME and operation.inputs:
                handed_on = operation.inputs[0]
            if handed_on is not None:
                self._share(i, output, self.root[handed_on.ref()])
            elif operation.type in ("Placeholder", "Const"):
                self._share(i, output, output.ref())
            else:
                self._allocate(i, output, self._size(operation, output))
        if any(output.dtype == tf.variant for output in operation.outputs):
            keeper = self.root[operation.outputs[0].ref()]
            copies = not lists and operation.type != "OptionalFromValue"
            for used in operation.inputs if not copies else ():
                if self.root[used.ref()] is not keeper:
                    self._keep(self.root[used.ref()], keeper, self._held(self.root[used.ref()], used))

    def _size(self, operation: Any, output: Any) -> int:
        """Of a new tensor. One whose shape the graph does not know is taken to be as large as what it is made of."""
        size = bytes_of(output.shape, output.dtype)
        new_list = output.dtype == tf.variant and operation.type != "OptionalFromValue"
        if not new_list and (output.dtype in (tf.variant, tf.resource) or output.shape.is_fully_defined()):
            return size
        held = [self._held(self.root[used.ref()], used) for used in operation.inputs if used.dtype != tf.resource]
        return max([size, *held])

    def _call(self, i: int, operation: Any, names: list[str], graphs: list[Any]) -> None:
        """An operation that calls functions: a nested tf.function, the branches of a conditional, or a loop."""
        chooses = operation.type in ("If", "StatelessIf", "Case", "StatelessCase")
        arguments = list(operation.inputs)[1 if chooses else 0 :]
        loop = dict(zip(names, graphs, strict=True)) if "body" in names else None
        times, finals = 1, {}
        if loop is not None:
            times, finals = trips_of(arguments, loop["cond"], loop["body"], self._computed)
        estimates = [Lifetimes(graph, self._given(graph, arguments, loop)).estimate() for graph in graphs]
        # A loop starts on its next steps before the last has ended.
        at_once = min(times or 1, operation.get_attr("parallel_iterations")) if loop else 1
        self.inside[i] = at_once * max(estimate.peak for estimate in estimates)
        results = [e.outputs for name, e in zip(names, estimates, strict=True) if name != "cond"]
        for j, output in enumerate(operation.outputs):
            found = [outputs[j] for outputs in results if j < len(outputs)]
            size = max([bytes_of(output.shape, output.dtype), *(one.size for one in found)])
            source = next((one.source for one in found if one.source is not None), None)
            if source is None or source >= len(arguments) or (loop and source != j):
                self._allocate(i, output, size)
                continue
            root = self.root[arguments[source].ref()]
            self._share(i, output, root)
            if output.dtype == tf.variant:
                grown = max(0, size - self.lists.get(root, 0)) * (times or 1)
                self._allocate(i, _Growth(i, j), grown)
                self._keep(_Growth(i, j), root, grown)
            else:
                self.values[output.ref()] = self.value(arguments[source])
        self.values.update((operation.outputs[j].ref(), value) for j, value in finals.items())

    def _given(self, graph: Any, arguments: list[Any], loop: Any) -> list[Given]:
        """What a called function's inputs are known to be. In a loop only what its body hands on as it is stays so."""
        if len(arguments) != len(graph.inputs):
            return [Given()] * len(graph.inputs)
        body = None if loop is None else loop["body"]
        stays = [body is None or body.inputs[j] is body.outputs[j] for j in range(len(arguments))]
        return [
            Given(self.lists.get(self.root[t.ref()], 0), self.value(t) if stay else None)
            for t, stay in zip(arguments, stays, strict=True)
        ]

    def _share(self, i: int, output: Any, root: Any) -> None:
        self.root[output.ref()] = root
        self.last.setdefault(root, i)

    def _allocate(self, i: int, output: Any, size: int) -> None:
        own = output if isinstance(output, _Growth) else output.ref()
        self.root[own], self.sizes[own] = own, size
        self.last.setdefault(own, i)
        self.born[i].append(own)
        if isinstance(output, _Growth) or output.dtype == tf.variant:
            self.lists[own] = size

    def _keep(self, root: Any, keeper: Any, size: int) -> None:
        if (root, keeper) not in self.kept:
            self.kept[root, keeper] = None
            self.lists[keeper] = self.lists.get(keeper, 0) + size

    def _held(self, root: Any, tensor: Any) -> int:
        """Bytes that a tensor holds, whether the graph allocates them or is given them."""
        if tensor.dtype == tf.variant:
            return self.lists.get(root, 0)
        if root in self.sizes and root not in self.lists:
            return self.sizes[root]
        return bytes_of(tensor.shape, tensor.dtype)

    def _run(self) -> int:
        """The most that is held at once."""
        dying: dict[int, list[Any]] = {}
        for root, i in self.last.items():
            dying.setdefault(i, []).append(root)
        live: dict[Any, int] = {}
        now = most = 0
        for i, operation in enumerate(self.operations):
            before = now
            free = [root for root in dying.get(i, ()) if root in live]
            for root in self.born[i]:
                size = self.sizes[root]
                taken = next((t for t in free if live[t] == size), None) if operation.type in IN_PLACE else None
                if taken is not None:
                    free.remove(taken)
                    now -= live.pop(taken)
                live[root] = size
                now += size
            # What a function makes are its outputs as well; what a loop's lists have grown by is beside that.
            grown = sum(self.sizes[root] for root in self.born[i] if isinstance(root, _Growth))
            most = max(most, now, before + grown + self.inside[i])
            for root in dying.get(i, ()):
                now -= live.pop(root, 0)
        return most


class _Growth(NamedTuple):
    """What a called function adds to a list that it is given: the operation, and the output."""

    operation: int
    output: int


def _ordered(operations: Iterable[Any]) -> list[Any]:
    """In the order in which they were made, but each after what it reads: a loop's lists are made after the loop."""
    done: dict[Any, None] = {}
    for operation in operations:
        stack = deque([operation])
        while stack:
            top = stack[-1]
            before = [used.op for used in top.inputs if used.op not in done] if top not in done else []
            if before:
                stack.extend(before)
            else:
                done[stack.pop()] = None
    return list(done)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: TensorFlow's, or one inside a library that it calls.

    TensorFlow reports a full disk under the same code, which is none.
    """
    if isinstance(error, tf.errors.ResourceExhaustedError):
        return not host.reports_other_limit(error)
    internal = isinstance(error, tf.errors.InternalError | tf.errors.UnknownError)
    return host.is_out_of_memory(error) or (internal and host.reports_failed_allocation(error))
