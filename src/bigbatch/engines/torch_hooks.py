"""Which hooks are ours, and whether anybody else has registered one.

A hook on a weight's transpose or cast copy cannot be seen in a loss's graph. But each hook that is registered, on
whatever it may be, takes the next number. Those of ours are counted apart.
"""

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

_ours = 0


def register(method: Callable[[Any], RemovableHandle], hook: Callable[..., Any]) -> RemovableHandle:
    """`method(hook)`, which registers a hook of bigbatch's that changes no gradient."""
    global _ours
    _ours += 1
    return method(hook)


def foreign_hooks() -> int:
    """How many hooks others have registered in this process so far."""
    # No public name has the number; tests/torch/test_private.py.
    return RemovableHandle.next_id - _ours


def has_hooks(node: Any) -> bool:
    """Whether somebody's `register_hook` or `register_prehook` of a node is in force."""
    handles = [register(method, _nothing) for method in (node.register_prehook, node.register_hook)]
    # A handle refers to all hooks that are registered where its own is.
    alone = all(len(handle.hooks_dict_ref() or ()) == 1 for handle in handles)
    for handle in handles:
        handle.remove()
    return not alone


def _nothing(*_: Any) -> None:
    """A hook that does nothing."""
