"""From its first backward to its close a window owns its parameters' gradients; what others do to them is refused.

Autograd adds up in `.grad` in place, and everybody may write there. Two marks show who did: which tensor `.grad` is,
and how often that was written to (`_version`). They are noted after each backward of ours and compared before the next.
A step of any optimizer on these parameters is refused by PyTorch's own hook, before it moves anything.

What nobody can see from here: writes through `.data`, and hooks on the accumulation node itself that write to `.grad`.
"""

import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from bigbatch.engines.torch_hooks import register

_version = attrgetter("_version")

_OPEN: "weakref.WeakSet[Ownership]" = weakref.WeakSet()
"""The windows that are open in this process, so that no parameter comes into two."""

_ABANDONED: list[Any] = []
"""Handles of windows that were collected in the middle of an optimizer's step; the next window removes them."""


class Ownership:
    """The parameters of an open window, and what their gradients were after its last backward.

    `check` comes before each backward of the window. As a context it surrounds that: inside it hooks after the
    accumulation may read but not write. `record` follows when nothing of the window moves any more.

    Args:
        who: the API that opened the window, for messages.
        drop: a weak reference to what forgets the window, for errors that are raised outside its own calls.
        parameters: those known from the start.
        instead: whether to take them from another window that holds them, as a state does that is loaded in its place;
            that window's next call raises.
        in_grad: whether gradients lie in `.grad` as autograd leaves them; fully_shard puts them there in its own time.

    Raises:
        RuntimeError: another window holds one of the parameters; that one is dropped.
    """

    _handle: Any = None  # also of an object that torch.compile has made without `__init__`

    def __init__(
        self,
        who: str,
        drop: Callable[[], Any],
        parameters: Iterable[Tensor] = (),
        *,
        instead: bool = False,
        in_grad: bool = True,
    ):
        self.who, self._drop = who, drop
        self.parameters: list[Tensor] = []
        self._in_grad = in_grad
        self._versions: list[int] = []  # of the parameters
        self._hooked: list[tuple[Tensor, Any]] = []  # parameters with hooks after the accumulation, and those hooks
        self._held: list[tuple[Tensor, Tensor]] = []  # parameters and their gradients
        self._gradients: list[Tensor] = []
        self._missing: list[Tensor] = []  # parameters without a gradient
        self._writes = 0  # to all gradients together
        self._replaces = False  # whether autograd may put another tensor into `.grad`, as it does for sparse ones
        while _ABANDONED:
            _ABANDONED.pop().remove()
        self._handle = register(register_optimizer_step_pre_hook, _refusing(weakref.ref(self)))
        self._taken: RuntimeError | None = None
        self.add(parameters, instead)
        _OPEN.add(self)

    def __del__(self) -> None:
        # The garbage collector may come while PyTorch goes through its hooks, which must stay as they are then.
        if self._handle is not None:
            _ABANDONED.append(self._handle) if _is_stepping() else self._handle.remove()

    def add(self, parameters: Iterable[Tensor], instead: bool = False) -> None:
        """Takes parameters in that the window has no gradients of yet."""
        parameters = list(parameters)
        ids = set(map(id, parameters)) if _OPEN else set()
        for other in list(_OPEN):
            if other is not self and not ids.isdisjoint(map(id, other.parameters)):
                other.lose(instead)
        self.parameters += parameters
        if self._in_grad:
            self._missing += parameters

    def lose(self, instead: bool) -> None:
        """To another window, which comes in its place; or else that one is refused, and this one dropped."""
        error = RuntimeError(
            "A second window on the same parameters, of an Accumulator, Gradients or bb.backward, inside an open one "
            f"of {self.who}. Let the first one close, by flush() or reset(), before the other begins: .grad is one "
            "place. " + _DROPPED
        )
        if not instead:
            self.forget(error)
            raise error
        self.close()
        self._taken, self._writes = error, -1

    def forget(self, error: Exception | None = None) -> None:
        """Drops the window, if its owner is still there, which may have to tell other ranks why."""
        drop = self._drop()
        if drop is not None:
            drop(error)

    def close(self) -> None:
        """Gives the parameters back."""
        _OPEN.discard(self)
        self._handle.remove()

    def __enter__(self) -> None:
        if len(self._versions) < len(self.parameters):  # not before, for a state may be loaded before its model
            new = self.parameters[len(self._versions) :]
            self._versions += map(_version, new)
            self._hooked += [(p, hooks) for p in new if (hooks := _hooks(p))]
        for p, hooks in self._hooked:
            _set_hooks(p, {0: _watching(hooks)})

    def __exit__(self, *_: Any) -> None:
        for p, hooks in self._hooked:
            _set_hooks(p, hooks)

    def record(self, anew: bool = False) -> None:
        """Notes what the gradients are now; `anew` where the window itself has put others into `.grad`."""
        if anew or self._replaces:
            self._held, self._gradients = [], []
            self._missing = list(self.parameters) if self._in_grad else []
        if self._missing and any(p.grad is not None for p in self._missing):
            self._held += [(p, p.grad) for p in self._missing if p.grad is not None]
            self._missing = [p for p in self._missing if p.grad is None]
            self._gradients = [grad for _, grad in self._held]
            self._replaces = any(grad.is_sparse for grad in self._gradients)
        self._writes = sum(map(_version, self._gradients))

    def check(self) -> None:
        """Compares with what `record` saw: every write, and of one gradient whether it is still there.

        Raises:
            RuntimeError: somebody else has written to a gradient, taken it away or put one there.
        """
        if sum(map(_version, self._gradients)) != self._writes:
            raise self._taken or _written(self._held)
        if self._missing and any(p.grad is not None for p in self._missing):
            raise _appeared(next(p for p in self._missing if p.grad is not None))
        for p, grad in self._held if self._replaces else self._held[:1]:
            if p.grad is not grad:
                raise _replaced(p)

    def verify(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Before the window closes: that nobody else has moved a gradient or a parameter in it.

        Args:
            parameters: the optimizers', where they should be those that the window was opened with.

        Raises:
            RuntimeError: somebody has; it says what was seen, and which line to remove.
        """
        self.check()
        gone = next((p for p, grad in self._held if p.grad is not grad), None)
        if gone is not None:
            raise _replaced(gone)
        if parameters is not None and list(map(id, parameters)) != list(map(id, self.parameters)):
            raise RuntimeError(
                "The optimizer's param_groups have changed inside an open window, which holds gradients of the "
                "parameters from before. Change them between windows, after flush() or reset(). " + _DROPPED
            )
        seen = self.parameters[: len(self._versions)]
        if list(map(_version, seen)) != self._versions:
            moved = [p for p, version in zip(seen, self._versions, strict=True) if p._version != version]
            moved = [p for p in moved if not _is_renormalized(p)]
            if moved:
                raise RuntimeError(
                    f"A parameter was moved inside an open window. Seen: {_named(moved[0])} was written to, as a "
                    "step() that is not the window's, load_state_dict() or any in-place write does, so that its "
                    "gradients were taken at different points. Write to parameters between windows; what the model's "
                    "own forward writes, write once an update. The window was dropped, and made no update."
                )


_DROPPED = "The window was dropped; the parameters and the optimizer are as they were."


def _named(p: Tensor) -> str:
    return f"a parameter of shape {tuple(p.shape)}"


def changed(seen: str, line: str) -> RuntimeError:
    """For gradients of an open window that others have moved: what was seen, and the line to remove."""
    return RuntimeError(
        f"The gradients of an open window were changed by others. Seen: {seen}. Remove {line}: a window adds up "
        f"and clears its gradients itself, and others may clip and apply them once it has closed. {_DROPPED}"
    )


def _written(held: list[tuple[Tensor, Tensor]]) -> RuntimeError:
    if any(p.grad is grad and not grad.is_sparse and not grad.count_nonzero() for p, grad in held):
        return changed("zeros in .grad by an in-place write, as zero_grad(set_to_none=False) makes it", "zero_grad()")
    line = "that line"
    return changed("an in-place write to .grad, as backward(), clip_grad_norm_() and clip_grad_value_() make it", line)


def _replaced(p: Tensor) -> RuntimeError:
    if p.grad is None:
        return changed(f"{_named(p)} has no .grad any more, as zero_grad() leaves it", "zero_grad()")
    seen = f"the .grad of {_named(p)} is another tensor, as zero_grad() with a backward() after it leaves it"
    return changed(seen, "both")


def _appeared(p: Tensor) -> RuntimeError:
    seen = f"{_named(p)} has a .grad that is not the window's, as a backward() of somebody else leaves it"
    return changed(seen, "that backward(), or put torch.autograd.grad in its place")


def _is_stepping() -> bool:
    """Whether some thread is inside an optimizer's step, or calls its hooks."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_globals.get("__name__") == Optimizer.__module__:
                return True
            frame = frame.f_back
    return False


def _refusing(owner: "weakref.ref[Ownership]") -> Callable[..., None]:
    """The hook before every optimizer's step in this process, as long as the window is open."""

    def refuse(optimizer: Any, *_: Any) -> None:
        owned = owner()
        if owned is None:
            return
        ours = set(map(id, owned.parameters))
        if any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            error = RuntimeError(
                f"{type(optimizer).__name__}.step() was called inside an open window, whose gradients are not "
                "complete. Remove it: the Accumulator steps when the window is full, and flush() before that; with "
                "Gradients step once backward or flush has returned a report; after bb.backward step once. Where a "
                "hook on the parameters steps (an optimizer in the backward), remove it. " + _DROPPED
            )
            owned.forget(error)
            raise error

    return refuse


def _hooks(p: Tensor) -> Any:
    """What `register_post_accumulate_grad_hook` has registered. No public name says it; tests fail when it moves."""
    return p._post_accumulate_grad_hooks  # pyright: ignore[reportAttributeAccessIssue]


def _set_hooks(p: Tensor, hooks: Any) -> None:
    p._post_accumulate_grad_hooks = hooks  # pyright: ignore[reportAttributeAccessIssue]


def _watching(hooks: Any) -> Callable[[Tensor], None]:
    """Calls a parameter's hooks, which may look at what a micro-batch has left in `.grad`, and change nothing."""

    def watch(p: Tensor) -> None:
        grad = p.grad
        before = p._version, None if grad is None else grad._version
        for hook in list(hooks.values()):
            hook(p)
        if p.grad is not grad or (p._version, None if grad is None else grad._version) != before:
            raise RuntimeError(
                f"A hook on {_named(p)} writes to it or to its .grad after each micro-batch's backward, before the "
                "batch's gradient is complete. Remove what register_post_accumulate_grad_hook has registered (an "
                "optimizer in the backward, a clipping), and do it once an update, after the window. "
                "The window was dropped; other parameters are as they were."
            )

    return watch


_RENORMALIZED = WeakTensorKeyDictionary()
"""A cache: asking the garbage collector takes a tenth of a second."""


def _is_renormalized(p: Tensor) -> bool:
    """Whether it is the table of an embedding with max_norm, which shortens the rows it looks up in its own forward.

    The full batch's forward shortens the same rows, before their first use. Whose parameter it is only the garbage
    collector knows, and it is asked where a parameter was written to.
    """
    if p not in _RENORMALIZED:
        users = [p]
        for _ in range(3):  # the module's `_parameters`, its attributes, and itself
            users = [user for used in users for user in gc.get_referrers(used) if isinstance(user, dict | nn.Module)]
        _RENORMALIZED[p] = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None for m in users)
    return _RENORMALIZED[p]
