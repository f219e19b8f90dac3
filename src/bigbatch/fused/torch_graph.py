"""What autograd's graph of a loss says: its leaves, and which weights' gradients are single products.

A weight that inputs are multiplied by has the gradient leftᵀ·right, of the inputs and of the outputs' gradients; a
table that rows are looked up in has a gradient in those rows only. Autograd makes each in a tensor of the weight's own
size and then adds that to `.grad`: one allocation and one pass over the weights a micro-batch too many. The graph names
the node that would do so. So the backward is run without those weights, and the factors are handed on as the engine
comes by each node, to be added where the sum lies.

Nothing of the forward is touched, neither modules nor weights: all is read after the loss is there.
"""

import logging
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from bigbatch.engines.torch_hooks import register
from bigbatch.fused.torch_proof import Proof, Sums, Trial, Use, log


class Graph(NamedTuple):
    """A loss's graph, as `read` finds it."""

    leaves: list[Tensor]  # which autograd is to give their gradients
    uses: list[Use]  # of all other weights
    functions: set[str]  # the names of `torch.autograd.Function`s in it
    tried: list[Use]  # of leaves whose products are to be compared with their gradients
    proof: Proof | None  # which is to learn of it

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


def is_alone() -> bool:
    """Whether this process is no rank of several, whose wrappers wait for every gradient that autograd makes."""
    return not (dist.is_available() and dist.is_initialized())


def is_compiled() -> bool:
    """Whether compiled autograd runs the backward, which takes a graph as a whole."""
    # No public name says so; a test fails when it moves.
    module: Any = sys.modules.get("torch._dynamo.compiled_autograd")
    return module is not None and bool(getattr(module, "compiled_autograd_enabled", False))


def is_worth(weight: Tensor, rows: int | None = None) -> bool:
    """Whether a gradient is worth taking from autograd: of so many rows, or of however many they will be.

    On a CPU it is where the pass that is spared takes longer than reading the graph for it. A GPU waits for its host
    unless it has much to do, and handing over a product takes the host longer (docs/pytorch.md).
    """
    if weight.device.type == "cpu":
        return weight.numel() >= 1 << 17
    if rows is None:
        return weight.numel() >= 1 << 22
    return weight.numel() * max(rows, 128) >= 1 << 33


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's gradient, which is not always its own from PyTorch 2.10 on."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def may_take(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those whose gradients are taken from autograd, if a loss's graph has them as products only."""
    return [p for p in parameters if _reason(p) is None]


def read(loss: Tensor, proof: Proof | None = None, explain: bool = False) -> Graph:
    """Goes through the graph once.

    Args:
        loss: has a graph.
        proof: which weights may be taken from autograd; None where all are left to it. Those with hooks, of a subclass
            or with another use always are, and with a `torch.autograd.Function` in the graph all are: a reentrant
            checkpoint's backward, for one, may not be run for some of the leaves only.
        explain: whether the logger `bigbatch.torch.products` says at DEBUG what is left to autograd, and why.
    """
    root: Any = get_gradient_edge(loss).node
    since = None if proof is None or is_compiled() else proof.begin(root)
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
    if uses and proof is not None:
        # A leaf that autograd comes to on any way gets all of its gradient from it.
        elsewhere = set(leaves)
        found = [] if functions else [use for use in uses if use.weight not in elsewhere]
        found, tried = proof.sort(found)
        elsewhere.update(use.weight for use in found)
        leaves += dict.fromkeys(use.weight for use in uses if use.weight not in elsewhere)
        uses = found
    if proof is not None and explain and log.isEnabledFor(logging.DEBUG):
        _explain(leaves, functions, {use.weight for use in tried}, since is None)
    return Graph(leaves, uses, functions, tried, proof)


def differentiate(loss: Tensor, gradient: Tensor | None, graph: Graph, sums: Sums) -> None:
    """`loss.backward(gradient)`, with the gradients of the weights in `graph.uses` added to `sums`.

    The host waits for the device where `graph.tried` is not empty: once for each weight and way to reach it.
    """
    if not graph.has_products:
        loss.backward(gradient=gradient)
        return
    # A node whose factors are taken has to be run even where nothing before it needs a gradient.
    edges: Any = [GradientEdge(use.node, 0) for use in graph.uses]
    handles = [register(use.node.register_prehook, _taking(use, sums)) for use in graph.uses]
    try:
        # Everything, where nothing is taken: hooks on nodes that lead to no leaf are called too.
        inputs = [*graph.leaves, *edges] if edges else None
        with Trial(graph.tried, sums, graph.proof) if graph.tried and graph.proof else nullcontext():
            torch.autograd.backward(loss, gradient, inputs=inputs)
    finally:
        # A hook refers to its node, which holds it.
        for handle in handles:
            handle.remove()


def _taking(use: Use, sums: Sums) -> Any:
    def take(grads: tuple[Tensor | None, ...]) -> None:
        if (grad := grads[0]) is not None:
            use.add(use.parts(grad), sums)

    return take


def _use(node: Any, kind: str, following: Any, since: int) -> Use | None:
    place, factor = _FACTORS[kind]
    ahead = following[place][0]
    transposed, between, passages = False, [], []
    while ahead is not None and (passed := type(ahead).__name__) != "AccumulateGrad":
        # What may stand between a weight and its product: it is transposed, and cast by autocast.
        if passed == "TBackward0":
            transposed = not transposed
        elif passed == "PermuteBackward0":
            transposed ^= ahead._saved_dims[0] % 2 == 1
        elif passed == "TransposeBackward0":
            transposed ^= (ahead._saved_dim0 - ahead._saved_dim1) % 2 == 1
        elif passed != "ToCopyBackward0":
            return None
        if ahead._sequence_nr() <= since:  # kept from an earlier forward, and nobody knows with which hooks
            return None
        between.append(ahead)
        passages.append(passed)
        ahead = ahead.next_functions[0][0]
    if ahead is None or _reason(weight := ahead.variable) is not None:
        return None
    if kind == "EmbeddingBackward0":
        special = transposed or node._saved_scale_grad_by_freq or node._saved_sparse
    else:
        special = kind == "AddmmBackward0" and node._saved_alpha != 1
    # With hooks around what was saved, asking for it may be dear, and under checkpointing is allowed only once.
    # PyTorch documents `_saved_…` and `_raw_saved_…`; that the latter tells its hook is held by a test.
    if special or getattr(getattr(node, f"_raw_saved_{factor}"), "unpack_hook", True) is not None:
        return None
    saved = getattr(node, f"_saved_{factor}")
    if type(saved) not in (Tensor, torch.nn.Parameter) or saved.layout != torch.strided:
        return None
    # A weight that is cast to complex has the real part of its product; one that is moved, a product elsewhere.
    if saved.is_complex() or saved.device != weight.device:
        return None
    rows = saved.numel() if factor == "indices" else len(saved)
    route = (kind, transposed, *passages)
    return Use(node, weight, place, transposed, between, ahead, route) if is_worth(weight, rows) else None


def _reason(weight: Tensor) -> str | None:
    """Why this weight's gradient is left to autograd, whatever its use; None where it need not be."""
    if not is_worth(weight):
        return "it is so small that adding its gradient takes less than asking for it"
    if type(weight) not in (Tensor, torch.nn.Parameter):
        return "tensor subclasses have their own products"
    if weight.ndim != 2 or not weight.is_floating_point():
        return "it is no matrix of real numbers"
    if getattr(weight, "grad_dtype", weight.dtype) != weight.dtype:
        return "its gradient is to have another dtype"
    if weight.layout != torch.strided or not weight.is_contiguous():
        return "its layout is not that of a matrix, row by row"
    # No public name says these two; tests fail when they move.
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:  # pyright: ignore[reportAttributeAccessIssue]
        return "it has hooks, which must see each gradient"
    return None


def _explain(leaves: list[Tensor], functions: set[str], tried: set[Tensor], hooked: bool) -> None:
    """Says once of each reason and shape why autograd is to make the gradient."""
    explained: set[tuple[str, torch.Size]] = set()
    for leaf in leaves:
        reason = _reason(leaf)
        if reason is None and leaf in tried:
            continue
        if reason is None and hooked:
            reason = "hooks are registered before each backward, or compiled autograd runs it"
        elif reason is None:
            several = ", ".join(sorted(functions))
            few = "" if leaf.device.type == "cpu" else ", or by few rows"
            reason = f"the graph has {several}" if functions else f"it is not only multiplied by, or looked up in{few}"
        if (reason, leaf.shape) not in explained:
            explained.add((reason, leaf.shape))
            log.debug("The gradient of a weight of shape %s is left to autograd: %s.", tuple(leaf.shape), reason)
