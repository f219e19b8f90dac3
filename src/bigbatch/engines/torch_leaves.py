"""The leaves of a loss: what its backward will give a gradient to, read from its graph before that."""

from collections.abc import Collection

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge


def parameters_of(loss: Tensor) -> list[Tensor]:
    """The leaves that `loss.backward()` will give a gradient to.

    Raises:
        ValueError: a reentrant checkpoint hides some of them.
    """
    leaves: list[Tensor] = []
    functions: set[str] = set()
    root = get_gradient_edge(loss).node
    nodes, seen = [root], {root}
    for node in nodes:
        # By the type's name: asking every node for an attribute that few have would take most of the time.
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaves.append(node.variable)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(node, BackwardCFunction):
            functions.add(kind)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    check_functions(functions)
    return leaves


def check_functions(functions: Collection[str]) -> None:
    """Refuses a graph with a reentrant checkpoint, given the names of the `torch.autograd.Function`s in it."""
    if "CheckpointFunctionBackward" in functions:
        raise ValueError(
            "Reentrant checkpointing hides its parameters until the backward runs, so their gradients cannot be "
            "kept apart from what .grad holds. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )
