"""One call of a chunked function: its pieces run without a graph, and again with one when their gradient is needed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bigbatch.engines.torch_dtypes import is_wide
from bigbatch.engines.torch_estimate import is_out_of_memory, release
from bigbatch.engines.torch_leaves import sequence_now
from bigbatch.plan import Choice, halved
from bigbatch.torch.batch import mapped
from bigbatch.torch.chunked_leaves import check_reach, outputs_of
from bigbatch.torch.chunked_memory import Given, KeptBytes, Planner, logger
from bigbatch.torch.replay import Moment
from bigbatch.torch.window import Window, fused_path


class Options(NamedTuple):
    """What `chunked` was given, and what it remembers of memory."""

    keep: int | Literal["auto"]
    dtype: torch.dtype | None
    planner: Planner
    choice: Choice | None = None  # of the size of the pieces, where it is "auto"


_checking = False


@contextmanager
def repetitions_checked() -> Iterator[None]:
    """Compares what pieces return in their second run with the first, for an audit: a pass over the outputs.

    Raises:
        RuntimeError: in a backward inside, where they differ.
    """
    global _checking  # autograd has threads of its own, which a context variable does not reach
    before, _checking = _checking, True
    try:
        yield
    finally:
        _checking = before


class _Piece(NamedTuple):
    """A piece that ran with a graph: its leaves, and what it returned."""

    leaves: list[Any]
    result: Any


class Call:
    """One call: where its pieces are cut, and what it takes to run each of them again.

    Attributes:
        size: examples in a piece; lowered for the second runs where memory runs out in one.
    """

    def __init__(self, given: Given, size: int, options: Options):
        self.setting, self.leaves, self.options, self.size = given.setting, given.leaves, options, size
        setting, leaves = given.setting, given.leaves
        self.cuts = list(_cuts(0, given.length, size))
        self.given = mapped(given.arguments, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)
        args, kwargs = given.arguments
        self.flat = not kwargs and all(isinstance(arg, Tensor) for arg in args)  # the commonest, by the shortest way
        differentiated = torch.is_grad_enabled()
        self.parameters = setting.parameters() if differentiated else {}
        self.inputs = [k for k, leaf in enumerate(leaves) if differentiated and leaf.needs_gradient]
        # What pieces are differentiated for: without the user's hooks, and without the gradient of another window.
        self.stand_ins = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        self.whole = {k: leaves[k].value.detach().requires_grad_() for k in self.inputs if leaves[k].dim is None}
        self.kept_from = len(self.cuts)
        self.kept: dict[int, _Piece] = {}
        self.moments: list[Moment] = []
        self.tried_again = False
        self.nesting: Any = None
        self.joined: list[tuple[str, Tensor]] = []

    def outputs(self) -> Any:
        """The whole batch's outputs, with one node of the graph behind them."""
        tensors = [*(self.leaves[k].value for k in self.inputs), *self.parameters.values()]
        if torch.is_grad_enabled():
            joined = iter(_Pieces.apply(self, *tensors))
        else:
            for i, cut in enumerate(self.cuts):
                args, kwargs = self._arguments(self._parts(*cut))
                self._join(i, self.setting.function(*args, **kwargs))
            joined = iter(self.whole_outputs)
        nesting, self.nesting = self.nesting, None
        return mapped(nesting, lambda _: next(joined))

    @property
    def whole_outputs(self) -> list[Tensor]:
        """The outputs of all pieces, joined."""
        return [whole for _, whole in self.joined]

    def run(self) -> list[Tensor]:
        """Runs all pieces and joins their outputs."""
        self.setting.replaced(self.stand_ins, self._run_all)
        return self.whole_outputs

    def _run_all(self) -> None:
        self._first()
        automatic = self.options.keep == "auto"
        while len(self.moments) < len(self.cuts):
            i = len(self.moments)
            keeps = i >= self.kept_from
            leaves = self._differentiable(*self.cuts[i])
            restore = self.setting.save() if keeps and automatic else None
            try:
                with torch.set_grad_enabled(keeps):
                    result, moment = self.setting.run(*self._arguments(leaves))
                self._add(leaves, result, moment)
                result = None  # before the next one runs
            except Exception as error:
                if restore is None or not is_out_of_memory(error):
                    raise
            else:
                continue
            # Outside the except the failed frames are gone, and with them the tensors that they held.
            self.kept.clear()
            self.kept_from = len(self.cuts)
            release(self.setting.device)
            restore()

    def _first(self) -> None:
        """Runs the first piece with a graph, which shows what the function reaches and what a piece keeps."""
        newest, leaves = sequence_now(), self._differentiable(*self.cuts[0])
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        holder = self.setting.holder
        measured = (
            KeptBytes([*tensors, *holder.parameters(), *holder.buffers()]) if self.options.keep == "auto" else None
        )
        with torch.enable_grad(), measured.counting() if measured else nullcontext():
            result, moment = self.setting.run(*self._arguments(leaves))
        check_reach(result, {*self.stand_ins.values(), *tensors}, newest)
        self.kept_from = max(0, len(self.cuts) - self._keep(result, measured))
        self._add(leaves, result, moment)

    def _add(self, leaves: list[Any], result: Any, moment: Moment) -> None:
        i = len(self.moments)
        self._join(i, result)
        if i >= self.kept_from:
            self.kept[i] = _Piece(leaves, result)
        self.moments.append(moment)

    def _keep(self, result: Any, measured: KeptBytes | None) -> int:
        """How many pieces keep their activations, of which the first has been measured."""
        if not (self.stand_ins or self.inputs):
            return 0
        if measured is None:
            return cast(int, self.options.keep)
        outputs = sum(y.nbytes for _, y in outputs_of(result, "output", None))
        parameters = sum(p.nbytes for p in self.stand_ins.values())
        # All outputs and their gradients, the gradients of inputs and the sums.
        standing = 2 * outputs * len(self.cuts) + sum(self.leaves[k].value.nbytes for k in self.inputs) + parameters
        return self.options.planner.keep(self.setting.device, measured.total + outputs, standing, parameters)

    def _join(self, i: int, result: Any) -> None:
        start, stop = self.cuts[i]
        outputs = list(outputs_of(result, "output", stop - start))
        if not i:
            length = self.cuts[-1][1]
            self.nesting = mapped(result, Tensor.detach)
            self.joined = [(where, leaf.new_empty((length, *leaf.shape[1:]))) for where, leaf in outputs]
        if [where for where, _ in outputs] != [where for where, _ in self.joined]:
            raise ValueError(
                "Every piece must return the same nesting of tensors. "
                f"Received: {[where for where, _ in self.joined]}, then {[where for where, _ in outputs]}."
            )
        for (_, leaf), (_, whole) in zip(outputs, self.joined, strict=True):
            whole[start:stop] = leaf.detach()

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Of the inputs and the parameters, from the outputs' gradients: each piece runs again, the last one first.

        Under "auto" an out-of-memory begins anew, with no kept pieces or with smaller ones.
        """
        while True:
            try:
                return self.setting.replaced(self.stand_ins, lambda: self._gradients(grads))
            except Exception as error:
                if not is_out_of_memory(error) or not self._lower():
                    raise
            release(self.setting.device)

    def _lower(self) -> bool:
        """Whether the second runs are worth another try, and with less memory where that gives the same."""
        choice = self.options.choice
        if choice is None and self.options.keep != "auto":
            return False
        if self.kept:
            self.kept.clear()
            return True
        # What is drawn, or averaged over a piece, would be something else in a smaller one.
        if choice is None or self.size == 1 or not any(moment.repeats_in_parts for moment in self.moments):
            first, self.tried_again = not self.tried_again, True
            return first  # with what `release` gives back
        before, self.size = self.size, halved(self.cuts[-1][1], self.size)
        choice.micro_batch = min(choice.micro_batch, self.size)
        message = 'micro_batch="auto": out of memory at %s in the backward, which is run again with %s.'
        logger.warning(message, f"{before:,}", f"{self.size:,}")
        return True

    def _gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        summed = [*self.whole.values(), *self.stand_ins.values()]
        for p in summed:
            p.grad = None
        dtype = self.options.dtype
        window = Window(planned=len(self.cuts), unit=1.0, dtype=dtype if is_wide(summed, dtype) else None)
        path = fused_path(in_ranks=True)  # on stand-ins, which no wrapper of ranks waits for
        window.fused = path and path.window()
        cut = {k: torch.zeros_like(self.leaves[k].value) for k in self.inputs if self.leaves[k].dim is not None}
        for start, stop, piece in self._pieces():
            with torch.enable_grad():
                surrogate = _surrogate(piece.result, [g if g is None else g.detach()[start:stop] for g in grads])
            if surrogate is not None:
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

    def _pieces(self) -> Iterator[tuple[int, int, _Piece]]:
        """The pieces with their graphs, the last one first: in this order autograd adds up those of one graph."""
        for i in reversed(range(len(self.cuts))):
            cut, moment = self.cuts[i], self.moments[i]
            if i in self.kept:
                yield *cut, self.kept.pop(i)
                continue
            cuts = _cuts(*cut, self.size) if moment.repeats_in_parts else [cut]
            for start, stop in reversed(list(cuts)):
                leaves = self._differentiable(start, stop)
                with torch.enable_grad():
                    piece = _Piece(leaves, self.setting.again(moment, *self._arguments(leaves)))
                if _checking:
                    self._check_repetition(start, stop, piece.result)
                yield start, stop, piece
                del piece, leaves  # before the next one runs

    def _check_repetition(self, start: int, stop: int, result: Any) -> None:
        for (where, now), (_, whole) in zip(outputs_of(result, "output", None), self.joined, strict=True):
            then = whole[start:stop].double()
            difference, largest = ((t.abs().max().item() if t.numel() else 0.0) for t in (now.double() - then, then))
            if not difference <= (1e-4 if now.element_size() >= 4 else 5e-2) * largest:
                raise RuntimeError(
                    "A chunked function must repeat itself: its pieces run again when their gradient is needed. "
                    f"Received: {where} of examples {start} to {stop - 1} differs by {difference:.3g}. It draws from "
                    "another generator than PyTorch's, or depends on what it has changed in the first run. Pass what "
                    "it draws as an argument, or keep all pieces with keep=n."
                )

    def _parts(self, start: int, stop: int) -> list[Any]:
        """What a piece gets of the leaves."""
        return [leaf.part(start, stop) for leaf in self.leaves]

    def _differentiable(self, start: int, stop: int) -> list[Any]:
        """The same as leaves of a graph of its own."""
        leaves = self._parts(start, stop)
        for k in self.inputs:
            leaves[k] = self.whole[k] if k in self.whole else leaves[k].requires_grad_()
        return leaves

    def _arguments(self, leaves: list[Any]) -> Any:
        if self.flat:
            return leaves, {}
        following = iter(leaves)
        return mapped(self.given, lambda _: next(following))


class _Pieces(torch.autograd.Function):
    """The pieces as one node: its inputs are all that has a gradient, its outputs are joined."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        # Saved by PyTorch, which notices when one of them is written to.
        ctx.save_for_backward(*tensors, *(leaf.value for leaf in call.leaves if isinstance(leaf.value, Tensor)))
        joined = call.run()
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
        return None, *ctx.call.gradients(grads)


def _cuts(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Where the pieces start and stop."""
    return ((k, min(k + size, stop)) for k in range(start, stop, size))


def _surrogate(result: Any, grads: list[Tensor | None]) -> Tensor | None:
    """A scalar whose gradient with respect to a piece's outputs is `grads`; None where no output has one."""
    outputs = [leaf for _, leaf in outputs_of(result, "output", None)]
    parts = [(y * g).sum() for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
    return sum(parts[1:], parts[0]) if parts else None
