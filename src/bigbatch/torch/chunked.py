"""`chunked`: a function of a whole batch, run in pieces, and run again when its gradient is needed.

A loss that compares the examples of a batch needs all of their outputs, and no micro-batch has them. So the function
runs piece by piece without a graph, its outputs are joined, and the loss sees the whole batch. When the loss's
gradient arrives, each piece runs again with a graph, as it ran before, and is differentiated alone. In memory are the
inputs, the outputs and one piece. This is GradCache (Gao et al. 2021, arXiv:2101.06983) as one node of a graph.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from bigbatch import errors
from bigbatch.engines.torch_dtypes import is_wide
from bigbatch.engines.torch_fsdp import shards_in
from bigbatch.engines.torch_leaves import nodes_of, sequence_now
from bigbatch.torch.batch import children_of, is_text, mapped
from bigbatch.torch.checks import check_dtype
from bigbatch.torch.replay import Moment, Setting
from bigbatch.torch.window import Window, fused_path


def chunked(
    function: Callable[..., Any],
    *,
    micro_batch: int,
    in_dims: int | Sequence[int | None] = 0,
    keep: int = 0,
    dtype: torch.dtype | None = torch.float32,
) -> Callable[..., Any]:
    """A function with the same values and gradients that holds the activations of `micro_batch` examples at a time.

    An example's output must depend on that example only; the loss that follows may compare them all::

        encode = bb.chunked(model, micro_batch=32)
        loss = info_nce(encode(images), encode(texts))  # 4,096 pairs, 32 in memory
        loss.backward()

    It takes one more forward pass than `function`, which repeats the first: dropout, autocast, training and evaluation
    modes. Buffers that the function writes to change once. Gradients reach the modules' parameters, the inputs and the
    arguments that are given whole. They cannot be differentiated again.

    Args:
        function: a module, or a function that closes over modules, is bound to one or names some. A
            `DistributedDataParallel` model stands for its module: pass the model to `Accumulator` for the reduction.
        micro_batch: examples in memory at once; the last piece may be shorter.
        in_dims: the dimension that holds the examples, as for `torch.vmap`: one for all positional arguments, or one
            entry for each, where None gives an argument whole to every piece. Tensors in keyword arguments are cut
            along their first dimension. What is no tensor is given whole, but for lists of text, one for each example.
        keep: how many pieces keep their activations, so that these do not run again: the last ones.
        dtype: the narrowest dtype in which the gradients of parameters and whole arguments add up over the pieces.

    Returns:
        A function with the arguments of `function`. Its outputs are nested as `function`'s are; tensors are joined
        along their first dimension, in the batch's order.

    Raises:
        TypeError, ValueError: an option is not as described; or, when called, an argument, an output, or a tensor that
            needs a gradient and is neither an argument nor a parameter of a module that was found.
        RuntimeError: in the backward, where a parameter or an input was written to since the forward; and where the
            gradient is differentiated again.
    """
    if isinstance(function, DistributedDataParallel):
        function = function.module
    if not callable(function):
        raise TypeError(f"function must be a module or a function. {errors.received('function', function)}")
    micro_batch = errors.check_micro_batch(micro_batch, auto=False)
    errors.check_keep(keep, auto=False)
    check_dtype(dtype)

    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = _leaves(args, kwargs, in_dims)
        length = errors.check_lengths([(leaf.where, leaf.length) for leaf in leaves if leaf.dim is not None])
        cuts = [(start, min(start + micro_batch, length)) for start in range(0, length, micro_batch)]
        if len(cuts) == 1:
            return function(*args, **kwargs)
        return _Call(function, (args, kwargs), leaves, cuts, keep).outputs(dtype)

    return run


class Leaf(NamedTuple):
    """A tensor among the arguments, or a list of text."""

    where: str
    value: Any
    dim: int | None  # along which it is cut; None where every piece gets it whole

    @property
    def length(self) -> int:
        """Its number of examples."""
        return self.value.shape[self.dim or 0] if isinstance(self.value, Tensor) else len(self.value)

    def part(self, start: int, stop: int) -> Any:
        """What a piece gets of it, apart from any graph."""
        if not isinstance(self.value, Tensor):
            return self.value if self.dim is None else self.value[start:stop]
        return self.of(self.value.detach(), start, stop)

    def of(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The same examples of a tensor of its shape."""
        return tensor if self.dim is None else tensor.narrow(self.dim, start, stop - start)


class _Piece(NamedTuple):
    """A piece that ran with a graph: its leaves, and what it returned."""

    leaves: list[Any]
    result: Any


class _Call:
    """One call: where its pieces are cut, and what it takes to run each of them again."""

    def __init__(self, function: Any, given: Any, leaves: list[Leaf], cuts: list[tuple[int, int]], keep: int):
        differentiated = torch.is_grad_enabled()
        device = next((leaf.value.device for leaf in leaves if isinstance(leaf.value, Tensor)), torch.device("cpu"))
        self.setting = Setting(function, device)
        if shards_in(self.setting.holder):
            raise ValueError("A fully_shard model cannot be chunked: its parameters are there in its own forward only.")
        self.given = mapped(given, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)
        self.leaves, self.cuts = leaves, cuts
        self.parameters = self.setting.parameters() if differentiated else {}
        self.inputs = [k for k, leaf in enumerate(leaves) if differentiated and _needs_gradient(leaf.value)]
        # What pieces are differentiated for: without the user's hooks, and without the gradient of another window.
        self.stand_ins = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        self.whole = {k: leaves[k].value.detach().requires_grad_() for k in self.inputs if leaves[k].dim is None}
        self.kept_from = max(1, len(cuts) - keep) if self.stand_ins or self.inputs else len(cuts)
        self.kept: dict[int, _Piece] = {}
        self.moments: list[Moment] = []

    def outputs(self, dtype: torch.dtype | None) -> Any:
        """The whole batch's outputs, with one node of the graph behind them."""
        # With a graph, which is dropped: it shows what the function reaches.
        newest = sequence_now()
        first = self._run(0)
        _check_reach(first, set(self.parameters.values()), newest)
        first = mapped(first, Tensor.detach)
        tensors = [*(self.leaves[k].value for k in self.inputs), *self.parameters.values()]
        joined = iter(_Pieces.apply(self, dtype, first, *tensors) if tensors else self.join(first))
        return mapped(first, lambda _: next(joined))

    def join(self, result: Any) -> list[Tensor]:
        """Runs the pieces after the first, whose result is given, and joins the outputs of all."""
        joined: list[tuple[str, Tensor]] = []
        for i, (start, stop) in enumerate(self.cuts):
            if i >= self.kept_from:
                result = self._keep(i)
            elif i:
                result = self._run(i)
            outputs = list(_outputs(result, "output", stop - start))
            if not i:
                length = self.cuts[-1][1]
                joined = [(where, leaf.new_empty((length, *leaf.shape[1:]))) for where, leaf in outputs]
            if [where for where, _ in outputs] != [where for where, _ in joined]:
                raise ValueError(
                    "Every piece must return the same nesting of tensors. "
                    f"Received: {[where for where, _ in joined]}, then {[where for where, _ in outputs]}."
                )
            for (_, leaf), (_, whole) in zip(outputs, joined, strict=True):
                whole[start:stop] = leaf.detach()
        return [whole for _, whole in joined]

    def gradients(self, grads: Sequence[Tensor | None], dtype: torch.dtype | None) -> list[Tensor | None]:
        """Of the inputs and the parameters, from the outputs' gradients: each piece runs again, the last one first.

        In this order autograd adds up the gradients of pieces that are one graph.
        """
        summed = [*self.whole.values(), *self.stand_ins.values()]
        window = Window(planned=len(self.cuts), unit=1.0, dtype=dtype if is_wide(summed, dtype) else None)
        path = fused_path(in_ranks=False)
        window.fused = path and path.window()
        cut = {k: torch.zeros_like(self.leaves[k].value) for k in self.inputs if self.leaves[k].dim is not None}
        for i in reversed(range(len(self.cuts))):
            start, stop = self.cuts[i]
            piece = self.kept.pop(i, None) or self._again(i)
            with torch.enable_grad():
                surrogate = _surrogate(piece.result, [g if g is None else g.detach()[start:stop] for g in grads])
            if surrogate is not None:
                window.parameters_of(surrogate)
                window.backward(surrogate, 1.0, summed)
            for k, total in cut.items():
                if piece.leaves[k].grad is not None:
                    self.leaves[k].of(total, start, stop).copy_(piece.leaves[k].grad)
        window.gradients(summed)
        sums = [window.sums.get(p, p.grad) for p in summed]
        for p in summed:
            p.grad = None
        rounded = [g if g is None else g.to(p.dtype) for g, p in zip(sums, summed, strict=True)]
        whole = dict(zip(self.whole, rounded, strict=False))
        return [*(whole.get(k, cut.get(k)) for k in self.inputs), *rounded[len(self.whole) :]]

    def _run(self, i: int) -> Any:
        args, kwargs = self._arguments([leaf.part(*self.cuts[i]) for leaf in self.leaves])
        result, moment = self.setting.run(args, kwargs)
        self.moments.append(moment)
        return result

    def _keep(self, i: int) -> Any:
        """Piece i with a graph that stays until the backward."""
        leaves = self._differentiable(i)
        with torch.enable_grad():
            args, kwargs = self._arguments(leaves)
            result, moment = self.setting.run(args, kwargs, self.stand_ins)
        self.moments.append(moment)
        self.kept[i] = _Piece(leaves, result)
        return result

    def _again(self, i: int) -> _Piece:
        """Piece i with a graph, as it ran before."""
        leaves = self._differentiable(i)
        with torch.enable_grad():
            return _Piece(leaves, self.setting.again(self.moments[i], self.stand_ins, *self._arguments(leaves)))

    def _differentiable(self, i: int) -> list[Any]:
        """Piece i's leaves, as leaves of a graph of its own."""
        leaves = [leaf.part(*self.cuts[i]) for leaf in self.leaves]
        for k in self.inputs:
            leaves[k] = self.whole[k] if k in self.whole else leaves[k].requires_grad_()
        return leaves

    def _arguments(self, leaves: list[Any]) -> Any:
        following = iter(leaves)
        return mapped(self.given, lambda _: next(following))


class _Pieces(torch.autograd.Function):
    """The pieces as one node: its inputs are all that has a gradient, its outputs are joined."""

    @staticmethod
    def forward(ctx: Any, call: _Call, dtype: torch.dtype | None, first: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.dtype = call, dtype
        ctx.set_materialize_grads(False)
        # Saved by PyTorch, which notices when one of them is written to.
        ctx.save_for_backward(*tensors, *(leaf.value for leaf in call.leaves if isinstance(leaf.value, Tensor)))
        joined = call.join(first)
        ctx.mark_non_differentiable(*(y for y in joined if not y.is_floating_point()))
        return tuple(joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            ctx.saved_tensors  # noqa: B018 - asking for them compares their versions
        except RuntimeError as error:
            raise RuntimeError(
                "A parameter or an input of a chunked function was written to between its forward and its backward, so "
                "that its pieces cannot run again as they ran. Step the optimizer, and write to inputs, after the "
                f"backward. PyTorch says: {error}"
            ) from None
        return None, None, None, *ctx.call.gradients(grads, ctx.dtype)


def _surrogate(result: Any, grads: list[Tensor | None]) -> Tensor | None:
    """A scalar whose gradient with respect to a piece's outputs is `grads`; None where no output has one."""
    outputs = [leaf for _, leaf in _outputs(result, "output", None)]
    parts = [(y * g).sum() for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    return sum(parts[1:], parts[0]) if parts else None


def _outputs(result: Any, where: str, examples: int | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a result with its place; where `examples` is given, as many must be in each."""
    children = children_of(result)
    if children is not None:
        for written, _, child in children:
            yield from _outputs(child, where + written, examples)
    elif result is not None:
        if not isinstance(result, Tensor) or result.is_complex():
            raise TypeError(f"A chunked function must return real tensors. {errors.received(where, result)}")
        if examples is not None and (result.ndim == 0 or len(result) != examples):
            raise errors.output_without_length(where, result, examples)
        yield where, result


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any) -> list[Leaf]:
    if isinstance(in_dims, int) and not isinstance(in_dims, bool):
        in_dims = [in_dims] * len(args)
    if not isinstance(in_dims, tuple | list) or len(in_dims) != len(args):
        raise ValueError(
            "in_dims must be an integer, or have one entry for each positional argument: the dimension that holds its "
            f"examples, or None. {errors.received('in_dims', in_dims)} There are {len(args)} positional arguments."
        )
    found = []
    for k, (arg, dim) in enumerate(zip(args, in_dims, strict=True)):
        found += _found(arg, f"args[{k}]", dim)
    for name, value in kwargs.items():
        found += _found(value, name, 0)
    return found


def _found(value: Any, where: str, dim: int | None) -> Iterator[Leaf]:
    """The leaves of an argument, in the order of `mapped`."""
    if is_text(value):
        yield Leaf(where, value, dim)
    elif isinstance(value, Tensor):
        if dim is not None and not -value.ndim <= dim < value.ndim:
            raise errors.leaf_without_length(where, value)
        yield Leaf(where, value, dim if dim is None else dim % value.ndim)
    else:
        for written, _, child in children_of(value) or ():
            yield from _found(child, where + written, dim)


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _check_reach(result: Any, parameters: set[Tensor], newest: int) -> None:
    """Refuses a function that reaches a tensor with a gradient which is neither a parameter nor an argument."""
    for node in nodes_of(y.grad_fn for _, y in _outputs(result, "output", None) if y.grad_fn is not None):
        leaf = getattr(node, "variable", None)
        if leaf is not None and leaf not in parameters:
            raise _out_of_reach(f"a leaf of shape {tuple(leaf.shape)}")
        if leaf is None and node._sequence_nr() <= newest:
            raise _out_of_reach(f"a result of {node.name()}")


def _out_of_reach(what: str) -> ValueError:
    return ValueError(
        "A chunked function may need gradients of its arguments and of its modules' parameters only. "
        f"Received: {what}, which it takes from outside. Pass it as an argument, with None in in_dims."
    )
