"""What autograd's graph of a loss says: its leaves, and which weights' gradients are single products.

A weight that inputs are multiplied by has the gradient leftᵀ·right, of the inputs and of the outputs' gradients; a
table that rows are looked up in has a gradient in those rows only. The graph names the node that would make each.
Nothing of the forward is touched, neither modules nor weights: all is read after the loss is there. It costs some
microseconds a node, and pays for large weights only (`torch_limits`, measured in benchmarks/torch_window.md).

What it reads is not all public; tests/torch/test_private.py fails when a name moves.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from bigbatch.fused import torch_limits
from bigbatch.fused.torch_proof import Proof, Use, log


class Graph(NamedTuple):
    """A loss's graph, as `read` finds it."""

    leaves: list[Tensor]  # which autograd is to give their gradients
    uses: list[Use]  # of all other weights
    functions: set[str]  # the names of `torch.autograd.Function`s in it
    tried: list[Use]  # of leaves whose products are to be compared with their gradients
    proof: Proof  # which is to learn of it

    @property
    def parameters(self) -> list[Tensor]:
        """All that the backward gives a gradient to."""
        return [*self.leaves, *dict.fromkeys(use.weight for use in self.uses)]

    @property
    def multiplied(self) -> list[Tensor]:
        """The weights that inputs are multiplied by, of those that are taken from autograd, now or once compared."""
        return list(dict.fromkeys(use.weight for use in (*self.uses, *self.tried) if use.place))

    @property
    def has_products(self) -> bool:
        """Whether a weight is taken from autograd, now or once compared."""
        return bool(self.uses or self.tried)


# Which of a node's inputs is a weight, and the name under which it saved the other factor.
_FACTORS = {"AddmmBackward0": (2, "mat1"), "MmBackward0": (1, "self"), "EmbeddingBackward0": (0, "indices")}


def is_compiled() -> bool:
    """Whether compiled autograd runs the backward, which takes a graph as a whole."""
    # No public name says so: tests/torch/test_private.py.
    module: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and bool(getattr(module, "compiled_autograd_enabled", False))


def eligible(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those whose gradients are taken from autograd, if a loss's graph has them as products only."""
    return [p for p in parameters if _why_not(p) is None]


def read(loss: Tensor, proof: Proof, explain: bool = False) -> Graph:
    """Goes through the graph once.

    Args:
        loss: has a graph.
        proof: which weights may be taken from autograd. Those with hooks, of a subclass or with another use are left to
            it, and with a `torch.autograd.Function` in the graph all are: a reentrant checkpoint's backward, for one,
            may not be run for some of the leaves only.
        explain: whether the logger `bigbatch.torch.products` reports at DEBUG what is left to autograd, and why.
    """
    root: Any = get_gradient_edge(loss).node
    since = None if is_compiled() else proof.begin(root)
    leaves: list[Tensor] = []
    uses: list[Use] = []
    functions: set[str] = set()
    nodes, seen = [root], {root}
    for node in nodes:
        # By the type's name: asking every node for an attribute that few have would take most of the time.
        kind = type(node).__name__
        if kind == "AccumulateGrad":
            leaves.append(node.variable)
            continue
        following = node.next_functions
        use = _use(node, kind, following, since) if since is not None and kind in _FACTORS else None
        if use is not None:
            uses.append(use)
            following = [edge for i, edge in enumerate(following) if i != use.place]
        elif isinstance(node, BackwardCFunction):
            functions.add(kind)
        for ahead, _ in following:
            if ahead is not None and ahead not in seen:
                seen.add(ahead)
                nodes.append(ahead)
    tried: list[Use] = []
    if uses:
        # A leaf that autograd reaches on any other route gets all of its gradient from it.
        reached = set(leaves)
        proven, tried = proof.sort([] if functions else [use for use in uses if use.weight not in reached])
        reached.update(use.weight for use in proven)
        leaves += dict.fromkeys(use.weight for use in uses if use.weight not in reached)
        uses = proven
    if explain and log.isEnabledFor(logging.DEBUG):
        _explain(leaves, functions, {use.weight for use in tried}, since is None)
    return Graph(leaves, uses, functions, tried, proof)


def _use(node: Any, kind: str, following: Any, since: int) -> Use | None:
    """The node's use of a weight whose gradient may be fused, or None."""
    place, factor = _FACTORS[kind]
    route = _route(following[place][0], since)
    if route is None or _why_not(weight := route.accumulation.variable) is not None:
        return None
    if kind == "EmbeddingBackward0":
        special = route.transposed or node._saved_scale_grad_by_freq or node._saved_sparse
    else:
        special = kind == "AddmmBackward0" and node._saved_alpha != 1
    # With hooks around what was saved, reading it may be costly, and under checkpointing is allowed only once. PyTorch
    # documents `_saved_…` and `_raw_saved_…`, but not that the latter has its hook: tests/torch/test_private.py.
    if special or getattr(getattr(node, f"_raw_saved_{factor}"), "unpack_hook", True) is not None:
        return None
    saved = getattr(node, f"_saved_{factor}")
    if type(saved) not in (Tensor, torch.nn.Parameter) or saved.layout != torch.strided:
        return None
    # A weight that is cast to complex has the real part of its product; one that is moved, a product elsewhere.
    if saved.is_complex() or saved.device != weight.device:
        return None
    if not torch_limits.worth_fusing(weight, saved.numel() if factor == "indices" else len(saved)):
        return None
    kinds = (kind, route.transposed, *(type(node).__name__ for node in route.between))
    return Use(node, weight, place, route.transposed, route.between, route.accumulation, kinds)


class _Route(NamedTuple):
    """How a node reaches a weight: by these nodes, to the one that adds to `.grad`."""

    transposed: bool
    between: list[Any]
    accumulation: Any


def _route(ahead: Any, since: int) -> _Route | None:
    """What may stand between a weight and its product: it is transposed, and cast by autocast. None for all else."""
    transposed, between = False, []
    while ahead is not None and (passed := type(ahead).__name__) != "AccumulateGrad":
        if passed == "TBackward0":
            transposed = not transposed
        elif passed == "PermuteBackward0":
            transposed ^= ahead._saved_dims[0] % 2 == 1
        elif passed == "TransposeBackward0":
            transposed ^= (ahead._saved_dim0 - ahead._saved_dim1) % 2 == 1
        elif passed != "ToCopyBackward0":
            return None
        if ahead._sequence_nr() <= since:  # kept from an earlier forward: it may have any hook
            return None
        between.append(ahead)
        ahead = ahead.next_functions[0][0]
    return None if ahead is None else _Route(transposed, between, ahead)


def _why_not(weight: Tensor) -> str | None:
    """Why this weight's gradient is left to autograd, whatever its use; None where it may be fused."""
    if not torch_limits.worth_fusing(weight):
        return "it is so small that adding its gradient takes less time than fusing it"
    if type(weight) not in (Tensor, torch.nn.Parameter):
        return "tensor subclasses have their own products"
    if weight.ndim != 2 or not weight.is_floating_point():
        return "it is no matrix of real numbers"
    if getattr(weight, "grad_dtype", weight.dtype) != weight.dtype:
        return "its gradient is to have another dtype"
    if weight.layout != torch.strided or not weight.is_contiguous():
        return "its layout is not that of a matrix, row by row"
    # No public name has these two: tests/torch/test_private.py.
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:  # pyright: ignore[reportAttributeAccessIssue]
        return "it has hooks, which must see each gradient"
    return None


def _explain(leaves: list[Tensor], functions: set[str], tried: set[Tensor], hooked: bool) -> None:
    """Logs why autograd makes a gradient, once for each reason and shape."""
    explained: set[tuple[str, torch.Size]] = set()
    for leaf in leaves:
        reason = _why_not(leaf)
        if reason is None and leaf in tried:
            continue
        if reason is None and hooked:
            reason = "hooks are registered before each backward, or compiled autograd runs it"
        elif reason is None:
            names = ", ".join(sorted(functions))
            few = "" if leaf.device.type == "cpu" else ", or by few rows"
            reason = f"the graph has {names}" if functions else f"it is not only multiplied by, or looked up in{few}"
        if (reason, leaf.shape) not in explained:
            explained.add((reason, leaf.shape))
            log.debug("The gradient of a weight of shape %s is left to autograd: %s.", tuple(leaf.shape), reason)
