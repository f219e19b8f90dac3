"""What a chunked function is given and what it returns: where its examples are, and what may need a gradient."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from bigbatch import errors
from bigbatch.engines.torch_leaves import check_functions, nodes_of
from bigbatch.torch.batch import children_of, is_text


class Leaf(NamedTuple):
    """A tensor among the arguments, or a list of text."""

    where: str
    value: Any
    dim: int | None  # along which it is cut; None where every piece gets it whole

    @property
    def length(self) -> int:
        """Its number of examples."""
        return self.value.shape[self.dim or 0] if isinstance(self.value, Tensor) else len(self.value)

    @property
    def needs_gradient(self) -> bool:
        """Whether it is a tensor that does."""
        return isinstance(self.value, Tensor) and self.value.requires_grad

    @property
    def kind(self) -> Any:
        """What a plan for it depends on."""
        if not isinstance(self.value, Tensor):
            return self.dim, len(self.value)
        return self.dim, self.value.shape, self.value.dtype, self.value.device, self.value.requires_grad

    def part(self, start: int, stop: int) -> Any:
        """What a piece gets of it, apart from any graph."""
        if not isinstance(self.value, Tensor):
            return self.value if self.dim is None else self.value[start:stop]
        return self.of(self.value.detach(), start, stop)

    def of(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """The same examples of a tensor of its shape."""
        return tensor if self.dim is None else tensor.narrow(self.dim, start, stop - start)


def leaves_of(args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any) -> list[Leaf]:
    """The leaves of the arguments, in the order of `mapped`.

    Raises:
        TypeError, ValueError: `in_dims` does not fit the arguments.
    """
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


def outputs_of(result: Any, where: str, examples: int | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a result with its place; where `examples` is given, as many must be in each."""
    children = children_of(result)
    if children is not None:
        for written, _, child in children:
            yield from outputs_of(child, where + written, examples)
    elif result is not None:
        if not isinstance(result, Tensor) or result.is_complex():
            raise TypeError(f"A chunked function must return real tensors. {errors.received(where, result)}")
        if examples is not None and (result.ndim == 0 or len(result) != examples):
            raise errors.output_without_length(where, result, examples)
        yield where, result


def check_reach(result: Any, parameters: set[Tensor], newest: int) -> None:
    """Refuses a function that reaches a tensor with a gradient which is neither a parameter nor an argument.

    Args:
        result: of a run with a graph on arguments that need no gradient.
        parameters: those that were found.
        newest: the number of the newest node before that run.
    """
    functions = set()
    outputs = [y for _, y in outputs_of(result, "output", None) if y.requires_grad]
    leaves = [y for y in outputs if y.grad_fn is None]
    for node in nodes_of(y.grad_fn for y in outputs if y.grad_fn is not None):
        functions.add(type(node).__name__)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        elif node._sequence_nr() <= newest:
            raise _out_of_reach(f"a result of {node.name()}")
    for leaf in leaves:
        if leaf not in parameters:
            raise _out_of_reach(f"a leaf of shape {tuple(leaf.shape)}")
    check_functions(functions)


def _out_of_reach(what: str) -> ValueError:
    return ValueError(
        "A chunked function may need gradients of its arguments and of its modules' parameters only. "
        f"Received: {what}, which it takes from outside. Pass it as an argument, with None in in_dims."
    )
