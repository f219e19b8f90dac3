"""Whether the products that a graph shows are the gradients that autograd makes: compared before they replace them.

Reading a graph is a conjecture about what its backward does. So when a weight is first met, or first met on another
route, autograd makes its gradient G as ever, and the factors that would have replaced it are multiplied by a few random
vectors V beside it: leftᵀ·(right·V) has to be G·V (Freivalds, 1977). That takes one pass over G and next to no memory,
where the product itself would take a third of the micro-batch and a temporary as large as the weight.
"""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from bigbatch.engines.torch_hooks import foreign_hooks, has_hooks, register
from bigbatch.engines.torch_leaves import sequence_now

log = logging.getLogger("bigbatch.torch.products")

_Grads = tuple[Tensor | None, ...]

# How many standard deviations off a sum may be. A normal one is further off once in 10⁹.
DEVIATIONS = 6.0

# How many numbers are copied into a wider dtype at once: as many as a core keeps near.
_AT_ONCE = 1 << 18

# The units of what a device may round float32 factors to, by the name of the setting.
_REDUCED = {"tf32": 2.0**-11, "bf16": 2.0**-9}


class Use(NamedTuple):
    """A node that would make a weight's gradient, or one of several parts of it."""

    node: Any
    weight: Tensor
    place: int  # of the weight among the node's inputs; 0 for a table that rows are looked up in
    transposed: bool  # whether the weight was multiplied by as its transpose, as `Linear` does
    between: list[Any]  # the nodes on the way from there to `accumulation`
    accumulation: Any  # the node that adds to `.grad`
    # How the weight is reached, by kinds of nodes. What was seen of one use holds for all uses on the same route.
    route: tuple[Any, ...]

    def casts(self) -> list[torch.dtype]:
        """The dtypes that the gradient goes through on its way to the weight's own."""
        # No public name has a node's dtypes; tests/torch/test_private.py.
        return [node._input_metadata[0].dtype for node in self.between]

    def parts(self, grad: Tensor) -> tuple[Any, ...]:
        """What `Sums` is to be given of this use, given the gradient of the node's output, before the node runs."""
        node = self.node
        if not self.place:
            return node._saved_indices, grad, signed(node._saved_padding_idx)
        inputs = node._saved_mat1 if self.place == 2 else node._saved_self
        return (grad, inputs) if self.transposed else (inputs, grad)

    def add(self, parts: tuple[Any, ...], sums: "Sums") -> None:
        """Adds this part of the weight's gradient."""
        (sums.product if self.place else sums.rows)(self.weight, *parts)


def signed(number: int) -> int:
    """A number that PyTorch shows without its sign."""
    return number - (1 << 64) if number >= 1 << 63 else number


class Known:
    """What was seen of weights. Dropped with them."""

    def __init__(self) -> None:
        self._routes = WeakTensorKeyDictionary()
        self.refused = WeakTensorKeyDictionary()  # whose gradients are left to autograd for good
        self.hooked = False  # whether somebody registered a hook before the last backward

    def routes_of(self, weight: Tensor) -> set[Any]:
        """The routes on which a weight's product is its gradient, to be added to."""
        routes: set[Any] | None = self._routes.get(weight)
        if routes is None:
            routes = self._routes[weight] = set()
        return routes


class Proof:
    """Which weights' products may replace their gradients in the backwards that follow each other.

    Args:
        known: shared by several of these, where one follows another.
        started: whether the first forward is still to come.
    """

    def __init__(self, known: Known | None = None, *, started: bool = False):
        self._known = known or Known()
        self._hooks = foreign_hooks() if started else None
        self._last = sequence_now() if started else 0
        self._anew = False  # whether to compare all weights in this backward
        self._trusted: dict[Tensor, set[Any]] = {}  # the known routes of weights whose accumulation nodes have no hooks

    def begin(self, root: Any) -> int | None:
        """Before a graph is read.

        Where somebody has registered a hook since the last call, all weights are compared anew: autograd makes their
        gradients, and the hook is called.

        Returns:
            The number of autograd's last node before this graph's: older ones may have any hook. None where hooks are
            registered before each backward: comparing each time would be slower than leaving all to autograd.
        """
        before, self._hooks = self._hooks, foreign_hooks()
        last, self._last = self._last, root._sequence_nr()
        self._anew = before is not None and before != self._hooks
        again, self._known.hooked = self._anew and self._known.hooked, self._anew
        if self._anew:
            self._trusted.clear()
        return None if again else last

    def sort(self, uses: list[Use]) -> tuple[list[Use], list[Use]]:
        """Those of the uses that may replace autograd's gradients, and those that have to be compared with them."""
        if all(use.route in self._trusted.get(use.weight, ()) for use in uses):
            return uses, []
        of: dict[Tensor, list[Use]] = {}
        for use in uses:
            of.setdefault(use.weight, []).append(use)
        proven: list[Use] = []
        tried: list[Use] = []
        for weight, several in of.items():
            if weight in self._known.refused or not (weight in self._trusted or not has_hooks(several[0].accumulation)):
                continue
            routes = self._trusted[weight] = self._known.routes_of(weight)
            trusted = not self._anew and all(use.route in routes for use in several)
            (proven if trusted else tried).extend(several)
        return proven, tried

    def learn(self, weight: Tensor, routes: set[Any], reason: str | None) -> None:
        """Takes in that a weight's product was its gradient on these routes, or why it is left to autograd."""
        if reason is None:
            self._known.routes_of(weight).update(routes)
            return
        self._known.refused[weight] = True
        self._trusted.pop(weight, None)
        log.warning(
            "The gradient of a weight of shape %s is left to autograd from here on: %s. The window is as exact as "
            "ever; fused=False leaves all gradients to autograd from the start.", tuple(weight.shape), reason
        )  # fmt: skip


_Given = tuple[Use, tuple[Any, ...]]


class Sums(Protocol):
    """Where weights' gradients add up."""

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Adds leftᵀ·right; both have one row for each of the weight's uses. They are the caller's: copy to keep."""
        ...

    def rows(self, weight: Tensor, indices: Tensor, gradients: Tensor, padding: int) -> None:
        """Adds the gradient of each row that was looked up to that row, but for the row `padding` (-1: none)."""
        ...


class Trial(TorchDispatchMode):
    """A backward in which autograd makes the gradients of some weights, and their products are compared with them.

    Where they are the same the products are added to the sums, as in the backwards to come: that a weight was compared
    changes no bit of an update. The host waits for the device once a weight.

    It is a mode that looks for clones: `Tensor.retain_grad`, of a weight's transpose or cast copy, makes one.
    """

    def __init__(self, uses: list[Use], sums: Sums, proof: Proof):
        super().__init__()
        self._sums, self._proof = sums, proof
        self._given: dict[Tensor, list[_Given]] = {}
        self._retained: set[Tensor] = set()
        self._cloned: Any = None
        self._handles: list[RemovableHandle] = []
        for use in uses:
            if use.weight not in self._given:
                self._given[use.weight] = []
                self._handles.append(register(use.accumulation.register_prehook, self._compare(use.weight)))
                self._handles.append(register(use.accumulation.register_hook, self._add(use.weight)))
            self._handles.append(register(use.node.register_prehook, self._take(use)))
            self._handles += [register(node.register_prehook, self._look(use.weight)) for node in use.between]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            self._cloned = args[0]
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._cloned = None
        while self._handles:
            self._handles.pop().remove()

    def _take(self, use: Use) -> Callable[[_Grads], None]:
        def take(grads: _Grads) -> None:
            if grads[0] is not None:
                self._given[use.weight].append((use, use.parts(grads[0])))

        return take

    def _look(self, weight: Tensor) -> Callable[[_Grads], None]:
        def look(grads: _Grads) -> None:
            # `retain_grad` copies what this node is given, right before this hook.
            if grads[0] is not None and grads[0] is self._cloned:
                self._retained.add(weight)

        return look

    def _compare(self, weight: Tensor) -> Callable[[_Grads], tuple[None] | None]:
        def compare(grads: _Grads) -> tuple[None] | None:
            given = self._given[weight]
            with no_dispatch():  # not for us; it has no public name
                same = is_product(weight, given, grads[0]) if grads[0] is not None and given else None
            reason = None
            if weight in self._retained:
                reason = "a tensor between it and its use retains its gradient"
            elif not same:
                reason = (
                    "its uses in the loss's graph do not give what autograd makes; there may be a hook between them"
                )
            if same is not None:
                self._proof.learn(weight, {use.route for use, _ in given}, reason)
                if reason is None:
                    return (None,)  # there is nothing left for autograd to add
            given.clear()  # what cannot be compared is autograd's too
            return None

        return compare

    def _add(self, weight: Tensor) -> Callable[..., None]:
        def add(*_: Any) -> None:
            # Only now, when autograd's own gradient is gone.
            given = self._given[weight]
            with no_dispatch():
                while given:
                    use, parts = given.pop(0)
                    use.add(parts, self._sums)

        return add


def is_product(weight: Tensor, given: list[_Given], gradient: Tensor) -> bool | None:
    """Whether a gradient is the sum of the products of a weight's uses; None where inf or NaN is in either.

    The elements of a row of the gradient G are sums of T terms. A sum's roundings, of unit u, have a standard deviation
    of √(2T)·u times its partial sums at most, and each factor and result that is rounded by itself adds its own unit.
    A row of the error times a normal vector is normal again, with the row's norm. Both within six deviations.

    Here the host waits for the device.
    """
    if gradient.layout != torch.strided or gradient.shape != weight.shape or gradient.is_complex():
        return False
    dtype = torch.promote_types(weight.dtype, torch.float32)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    # Of its own generator: the user's draws stay as they are.
    generator = torch.Generator(weight.device).manual_seed(len(weight))
    # A difference in one row is missed where each vector is nearly orthogonal to it, as one in some thousand is; with
    # 16 bits one in some ten.
    shape = (weight.shape[1], 1 if gradient.dtype.itemsize >= 4 else 4)
    vectors = torch.randn(shape, generator=generator, device=weight.device, dtype=dtype)
    image = vectors.new_zeros(len(weight), shape[1])
    columns = weight.shape[1]
    terms, unit, single, least = columns, _unit(dtype), 0.0, 0.0
    factors = [(use, *(parts if use.place else _looked_up(*parts))) for use, parts in given]
    for use, left, right in factors:
        product = right.to(dtype) @ vectors
        if use.place:
            image += left.t().to(dtype) @ product
        else:
            image.index_add_(0, left, product)
        terms += len(right)
        unit = max(unit, _unit(torch.promote_types(right.dtype, torch.float32)))
        for rounded in (gradient.dtype, right.dtype, *use.casts()):
            single, least = max(single, _unit(rounded)), max(least, _least(rounded))
        single = max(single, _reduced(right))
    relative = DEVIATIONS * ((len(given) + 2) * single + DEVIATIONS * (2 * terms) ** 0.5 * unit)
    absolute = DEVIATIONS * columns**0.5 * least + torch.finfo(gradient.dtype).tiny
    difference, size = (_times(gradient, vectors) - image).abs().amax(1), image.abs().amax(1)
    # Their squares may be too small or too large for float32, which a first pass in it, four times as fast, shows.
    excess = math.inf
    for precision in dict.fromkeys((dtype, wide)):
        squares = image.new_zeros(len(weight), dtype=precision)  # Σᵣ |leftᵣᵢ|²·‖rightᵣ‖², as the partial sums are
        for use, left, right in factors:
            _add_squares(squares, use, left, right)
        excess = (difference - relative * (squares.sqrt() + size)).amax().item() - absolute
        if excess <= 0 and math.isfinite(excess):
            return True
    return False if math.isfinite(excess) else None


def _add_squares(squares: Tensor, use: Use, left: Tensor, right: Tensor) -> None:
    """Adds Σᵣ |leftᵣᵢ|²·‖rightᵣ‖² for each row i of the weight."""
    norms = torch.linalg.vector_norm(right, dim=1, dtype=squares.dtype).square_()
    if not use.place:
        squares.index_add_(0, left, norms)
        return
    rows = max(1, _AT_ONCE // left.shape[1])
    for part, weights in zip(left.split(rows), norms.split(rows), strict=True):
        squares.addmv_(part.to(squares.dtype).square().t(), weights)


def _looked_up(indices: Tensor, gradients: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """The indices of the rows that were looked up, one after the other, and those rows' gradients."""
    gradients = gradients.masked_fill((indices == padding).unsqueeze(-1), 0)
    return indices.reshape(-1), gradients.reshape(-1, gradients.shape[-1])


def _times(gradient: Tensor, vectors: Tensor) -> Tensor:
    if gradient.dtype == vectors.dtype:
        return gradient @ vectors
    rows = max(1, _AT_ONCE // gradient.shape[1])
    return torch.cat([part.to(vectors.dtype) @ vectors for part in gradient.split(rows)])


def _unit(dtype: torch.dtype) -> float:
    """Half the distance from 1 to the next number."""
    return torch.finfo(dtype).eps / 2


def _least(dtype: torch.dtype) -> float:
    """The distance between the smallest numbers."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def _reduced(factor: Tensor) -> float:
    """The unit that PyTorch's settings allow float32 factors to be rounded to before they are multiplied."""
    if factor.dtype != torch.float32:
        return 0.0
    backend: Any = torch.backends.mkldnn if factor.device.type == "cpu" else torch.backends.cuda
    return _REDUCED.get(getattr(backend.matmul, "fp32_precision", ""), 0.0)
