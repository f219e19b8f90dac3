"""Autograd's graph before its backward: its nodes, their order, and the leaves that will get a gradient."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge


def nodes_of(roots: Iterable[Any]) -> Iterator[Any]:
    """Every node of the graph behind some nodes, these first, each once."""
    nodes = list(dict.fromkeys(roots))
    seen = set(nodes)
    for node in nodes:
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)


def sequence_now() -> int:
    """The number of a node that autograd makes now, in this thread."""
    with torch.enable_grad():
        # No public name has it; tests/torch/test_private.py.
        return torch.empty(0, requires_grad=True).view(0).grad_fn._sequence_nr()  # pyright: ignore[reportOptionalMemberAccess]


def parameters_of(loss: Tensor) -> list[Tensor]:
    """The leaves that `loss.backward()` will give a gradient to.

    Raises:
        ValueError: a reentrant checkpoint hides some of them.
    """
    leaves: list[Tensor] = []
    functions: set[str] = set()
    for node in nodes_of([get_gradient_edge(loss).node]):
        # By the type's name: asking every node for an attribute that few have would take most of the time.
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaves.append(node.variable)
        elif isinstance(node, BackwardCFunction):
            functions.add(kind)
    check_functions(functions)
    return leaves


def check_functions(functions: Collection[str]) -> None:
    """Refuses a graph with a reentrant checkpoint, given the names of the `torch.autograd.Function`s in it."""
    if "CheckpointFunctionBackward" in functions:
        raise ValueError(
            "Reentrant checkpointing hides its parameters until the backward runs, so their gradients cannot be "
            "kept apart from what .grad holds. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )
