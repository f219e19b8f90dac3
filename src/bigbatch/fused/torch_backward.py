"""The backward of a micro-batch in which large weights' gradients go straight into the sums, as factored gradients.

Autograd makes each weight's gradient in a tensor of the weight's own size and then adds that to `.grad`: one allocation
and one pass over the weights a micro-batch too many. Here the backward is run without those weights, and their factors
are added where the sum lies. A window of 16 took 0.4 to 0.9 of the hand-written loop's time
(benchmarks/torch_window.md, benchmarks/growth-gpu.md). It does nothing for a window of one micro-batch, for small
weights, for those that `torch_graph` leaves to autograd, and in a process group that bigbatch was not given.
"""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bigbatch.engines.torch_hooks import register
from bigbatch.engines.torch_leaves import check_functions, parameters_of
from bigbatch.fused import torch_limits
from bigbatch.fused.torch_deferred import DeferredSum
from bigbatch.fused.torch_graph import Graph, eligible, read
from bigbatch.fused.torch_kernels import WideSum
from bigbatch.fused.torch_proof import Known, Proof, Sums, Trial, Use

# What calls of `bb.backward` have seen of weights, for the next calls.
CALLS = Known()


class FusedPath:
    """Makes the windows of one Accumulator, or of one call, fused where that is safe and worth it.

    Args:
        known: what was seen of weights, shared with others; None to begin anew.
        in_ranks: whether bigbatch itself reduces the gradients over the ranks that there are.
    """

    def __init__(self, known: Known | None = None, *, in_ranks: bool = False):
        self._proof = Proof(known, started=True)
        self._in_ranks = in_ranks

    def window(self, parameters: list[Tensor] | None = None) -> "FusedBackward | None":
        """The backwards of a window that opens; None where they are all autograd's.

        Args:
            parameters: of the optimizer. None where only the first loss's graph will show them.
        """
        if not (self._in_ranks or single_process()):
            return None
        if parameters is None:
            return FusedBackward(self._proof, None)
        worth = any(map(torch_limits.worth_fusing, parameters))
        return FusedBackward(self._proof, DeferredSum(eligible(parameters))) if worth else None


class FusedBackward:
    """The backwards of one window's micro-batches.

    Args:
        proof: which weights' products may replace their gradients.
        deferred: the sums of weights whose products may be deferred. None where the first graph is to show them.
    """

    def __init__(self, proof: Proof, deferred: DeferredSum | None = None):
        self.active = True  # until a graph has shown that there is nothing to fuse
        self._proof, self._deferred = proof, deferred
        self._graph: Graph | None = None
        self._first = True

    def parameters_of(self, loss: Tensor) -> list[Tensor]:
        """The leaves that the coming backward of this loss will give a gradient to.

        Raises:
            ValueError: a reentrant checkpoint hides some of them.
        """
        if not self.active:
            return parameters_of(loss)
        self._graph = self._read(loss)
        check_functions(self._graph.functions)
        return self._graph.parameters

    def backward(self, loss: Tensor, gradient: Tensor | None, window: Any = None) -> None:
        """`loss.backward(gradient)`; of fused weights the gradients are added to the sums instead.

        The host waits for the device where a weight's product is compared with its gradient for the first time.

        Args:
            loss: has a graph.
            gradient: of the loss.
            window: the `bigbatch.torch.window.Window` whose sums are wide; None where they are in `.grad`.
        """
        graph, self._graph = self._graph or (self._read(loss) if self.active else None), None
        if graph is None:
            loss.backward(gradient=gradient)
        elif window is None:
            differentiate(loss, gradient, graph, self._sum_of(graph))
        else:
            differentiate(loss, gradient, graph, WideSum(window))

    def flush(self) -> None:
        """Computes the deferred products: from here on the gradients are all there."""
        if self._deferred is not None:
            self._deferred.flush()

    def factors(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """Copies of the factors of deferred products, for a checkpoint."""
        return {} if self._deferred is None else self._deferred.factors()

    def restore(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds the factors of a product that was deferred when a checkpoint was saved."""
        if self._deferred is None:
            self._deferred = DeferredSum()
        self._deferred.restore(weight, left, right)

    def _read(self, loss: Tensor) -> Graph:
        graph = read(loss, self._proof, explain=self._first)
        if self._first:
            self._first = False
            self.active = graph.has_products  # the next micro-batches have hardly others
        return graph

    def _sum_of(self, graph: Graph) -> DeferredSum:
        if self._deferred is None:
            self._deferred = DeferredSum(graph.multiplied)
        return self._deferred


def differentiate(loss: Tensor, gradient: Tensor | None, graph: Graph, sums: Sums) -> None:
    """`loss.backward(gradient)`, with the gradients of the weights in `graph.uses` added to `sums`.

    The host waits for the device where `graph.tried` is not empty: once for each weight and route to it.
    """
    if not graph.has_products:
        loss.backward(gradient=gradient)
        return
    # A node whose factors are taken has to be run even where nothing before it needs a gradient.
    edges: Any = [GradientEdge(use.node, 0) for use in graph.uses]
    handles = [register(use.node.register_prehook, _adding(use, sums)) for use in graph.uses]
    try:
        # Everything, where nothing is fused: hooks on nodes that lead to no leaf are called too.
        inputs = [*graph.leaves, *edges] if edges else None
        with Trial(graph.tried, sums, graph.proof) if graph.tried else nullcontext():
            torch.autograd.backward(loss, gradient, inputs=inputs)
    finally:
        # A hook refers to its node, which holds it.
        for handle in handles:
            handle.remove()


def _adding(use: Use, sums: Sums) -> Any:
    def add(grads: tuple[Tensor | None, ...]) -> None:
        if (grad := grads[0]) is not None:
            use.add(use.parts(grad), sums)

    return add


def single_process() -> bool:
    """Whether this process is no rank of several, whose wrappers wait for every gradient that autograd makes."""
    return not (dist.is_available() and dist.is_initialized())
