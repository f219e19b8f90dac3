"""A window's mean gradient in `.grad`, for whoever clips, steps and schedules by other means.

`Gradients` opens and closes the window. `Accumulator` is this and the update on top (`bigbatch.torch.stream`).
"""

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from bigbatch import errors
from bigbatch.engines.torch_dtypes import is_wide
from bigbatch.engines.torch_fsdp import whole
from bigbatch.every import Every, Items, as_every, planned
from bigbatch.noise import NoiseScale, UntilNoise
from bigbatch.torch import scaling
from bigbatch.torch.checkpoint import check_state, restore_window, window_state
from bigbatch.torch.checks import check_dtype, check_flag, check_items, check_loss, check_parameters, check_scaler
from bigbatch.torch.collectives import BACKWARD, FLUSH, LOAD, MAKING
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.noise import Meter
from bigbatch.torch.norms import get_total_norm
from bigbatch.torch.optimizers import parameters_in
from bigbatch.torch.ownership import Ownership
from bigbatch.torch.terms import gradient_terms, state_terms, window_terms
from bigbatch.torch.update import Update, why_skipped
from bigbatch.torch.window import Window, WindowTotals, fused_path, scale_
from bigbatch.torch.wrapped import Sync, ranks_of

T = TypeVar("T")

_DISCARDED = (
    "Gradients lay in .grad when a window opened, and were discarded, as by zero_grad() at the top of a loop. Whatever "
    "left them (an earlier backward, a learning-rate finder, bb.backward) should call zero_grad() when it is done."
)


class Sums(NamedTuple):
    """A full window that is closed, and whose sums are not means yet.

    Attributes:
        window: its sums, of all ranks.
        gradients: those of them that exist, dense.
        totals: None where they have not been read yet, which makes the host wait.
    """

    window: Window
    gradients: list[Tensor]
    totals: WindowTotals | None

    def read(self) -> WindowTotals:
        """The totals. Here the host waits for the device."""
        return self.totals or self.window.close()


class Gradients:
    """Leaves the mean gradient of many micro-batches in `.grad`, and does nothing else: no clipping, no step.

    It takes the place of `loss.backward()` in a loop or a trainer that clips, steps and schedules itself::

        grads = bb.Gradients(model.parameters(), every=64)
        for x, y in loader:
            if grads.backward(loss_fn(model(x), y), items=len(x)):
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()

    Inside a window the gradients are the window's, part of whose sums may lie elsewhere: a step, backward, zero_grad
    or clipping by other code raises RuntimeError and drops the window. Once it has closed they are the caller's. The
    next `backward` opens a new window and discards the mean that was left; other gradients that lie there are
    discarded with one warning.

    Args:
        parameters: tensors, such as `model.parameters()`; or an optimizer, or a list of several that share no
            parameter, whose param_groups may then grow between windows.
        every: when a window closes, as for `Accumulator`: a number of micro-batches, a callable that takes the
            window's index and returns one, `bb.items(4096)`, or `bb.until_noise(at_most=256)`. None leaves it to the
            caller, by `last=True` or `flush`; the number spares a pass over the gradients where it is known.
        model: the DistributedDataParallel or fully_shard model that the losses come from, as for `Accumulator`.
        sync: when a fully_shard model adds up over the ranks, as for `Accumulator`.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 parameters add up in float32
            and are rounded once, into `.grad`. None adds up in the parameters' own dtype.
        fused: as for `Accumulator`.
        scaler: the `torch.amp.GradScaler` whose scale the losses are multiplied by. The mean in `.grad` is scaled
            once; the caller unscales it, steps through the scaler and updates that.
        noise: measures the gradient noise scale, as for `Accumulator`; under a scaler too.
        norm: whether to take the mean's norm for `Update.grad_norm`. False spares a pass over the gradients where the
            caller takes the norm anyway, to clip; `grad_norm` is NaN then.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was touched.
    """

    _owner = "bb.Gradients"  # for messages

    def __init__(
        self,
        parameters: Iterable[Tensor] | Optimizer | Sequence[Optimizer],
        every: Every | UntilNoise | None = None,
        *,
        model: torch.nn.Module | Ranks | None = None,
        sync: Sync | None = None,
        dtype: torch.dtype | None = torch.float32,
        fused: bool = True,
        scaler: torch.amp.GradScaler | None = None,
        noise: bool | int = False,
        norm: bool = True,
    ):
        agreeing = isinstance(model, Ranks)  # an Accumulator's ranks, which agree on all of its options
        self._ranks = model if agreeing else ranks_of(model, sync, MAKING)
        with nullcontext({}) if agreeing or self._ranks is None else self._ranks.agreeing(MAKING) as terms:
            given = check_parameters(parameters)
            self.optimizer, self._tensors = (None, given) if isinstance(given, list) else (given, [])
            self.every = every if every is None or isinstance(every, UntilNoise) else as_every(every)
            self.scaler, self.dtype, self.fused = check_scaler(scaler), check_dtype(dtype), check_flag("fused", fused)
            self._norm = check_flag("norm", norm) or bool(noise) or isinstance(every, UntilNoise)
            scaling.check_width(scaler, self._parameters(), dtype)
            self._meter = Meter(every, noise)
            if self._ranks is not None:
                self._ranks.check(every, noise, scaler)
                terms.update(gradient_terms(self, self._ranks, sync, noise))
        fusible = self.fused and (self._ranks is None or self._ranks.shards is None)
        self._fused_path = fused_path(in_ranks=self._ranks is not None) if fusible else None
        self._index = 0
        self._plan: float | Items | UntilNoise = 0  # of the open window
        self._window: Window | None = None
        self._owned: Ownership | None = None
        self._left = WeakTensorKeyDictionary()  # the gradients of the last mean, as long as they live
        self._scaler_mark: Any = None
        self._warned = self._repeats = False
        if not agreeing:
            self._start()
            if self._ranks is not None:
                self._ranks.meetings.owner = "Gradients"

    @property
    def pending(self) -> int:
        """How many micro-batches the open window holds."""
        return 0 if self._window is None else self._window.micro_batches

    @property
    def index(self) -> int:
        """How many means have been left in `.grad`, and so the index of the next window."""
        return self._index

    @property
    def noise_scale(self) -> NoiseScale:
        """The running gradient noise scale, of the windows that were measured."""
        return self._meter.scale

    def __repr__(self) -> str:
        every = getattr(self.every, "__name__", self.every)
        count = len(self._parameters())
        return f"Gradients({count} parameters, every={every}: {self._index} left, {self.pending} micro-batches pending)"

    def backward(self, loss: Tensor, *, items: float | Tensor, last: bool = False) -> Update | None:
        """Takes one micro-batch in: differentiates its loss, and leaves the mean in `.grad` if the window closes.

        Args:
            loss: the micro-batch's mean loss, a real scalar that requires a gradient.
            items: what the mean is over, as for `Accumulator.backward`.
            last: closes the window with this micro-batch, full or not. Under fully_shard it is the same on all ranks.

        Returns:
            None inside a window. Where it closed, what it came to: `loss` and `grad_norm` are the mean's, and inf or
            NaN where that is, which then lies in `.grad` for the caller's own guard to see. Where there is no mean,
            `skipped` says why, and every `.grad` is None: the window held no items, items that are no counts, or no
            gradient.

        Raises:
            TypeError, ValueError: the loss or `items` is not as described; the window stays as it was.
            RuntimeError: other code has changed the window's gradients or parameters; it was dropped.

        Any error of autograd's drops the open window, as `reset` does, and goes on to the caller. An error in your own
        forward, before the call, leaves the window as it was. The host waits for the device when the window closes.
        """
        sums = self._add(loss, items, last)
        return None if sums is None else self._leave_mean(sums)

    def flush(self) -> Update | None:
        """Closes a window that is not full: at the end of an epoch, or of the data.

        Returns:
            None where nothing was pending. Otherwise what the window came to, as `backward` returns it.

        Across ranks it also is the join: a rank that calls it takes part in the windows of those that have more data,
        one a call. Where ranks have unequally much, call it until it returns None, on all of them::

            while grads.flush():
                optimizer.step()
        """
        if self._ranks is not None:
            sums, *_ = self._join_window(self._ranks)
        else:
            sums = None if self._window is None else self._sums(self._window)
        return None if sums is None else self._leave_mean(sums)

    def join(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's micro-batches, for ranks of a fully_shard model with unequally many, as `Accumulator.join`."""
        if self._ranks is None or self._ranks.shards is None:
            yield from loader
            return
        try:
            for micro_batch, repeated in self._ranks.in_step(loader):
                self._repeats = repeated
                yield micro_batch
        finally:
            self._repeats = False

    def reset(self) -> None:
        """Forgets the open window: its gradients go, and the next `backward` starts a new one."""
        self._release()
        self._window = None
        for p in self._parameters():
            p.grad = None
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """The count of windows and the open one, as plain numbers and tensors; the latter are not copies.

        Inside a window every rank has its own part, and saves it; where none is open, all have the same state.
        `torch.load(..., weights_only=True)` reads it back. A mean that lies in `.grad` is not part of it.
        """
        parameters = self._parameters()
        window = self._window
        if self._owned is not None:
            try:
                self._owned.verify(parameters)
            except BaseException:
                self._drop()
                raise
        return {
            "index": self._index,
            "pending": self.pending,
            "shapes": [tuple(p.shape) for p in parameters],
            "window": None if window is None else window_state(window, parameters, self._ranks),
            "noise": self._meter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called, inside a window too, bit for bit.

        Raises:
            ValueError: the state is of other parameters, damaged, or no state at all; it names the entry. Nothing was
                touched, and the open window is as it was.
        """
        parameters = self._parameters()
        with nullcontext({}) if self._ranks is None else self._ranks.agreeing(LOAD) as terms:
            check_state(state, parameters, self._ranks, self._wide())
            if state["window"] is not None and callable(self.every):
                planned(self.every, state["index"])
            if self._ranks is not None:
                terms.update(state_terms(state, self._ranks))
        self._index = state["index"]
        self.reset()
        self._meter.load_state_dict(state.get("noise"))  # older states have none
        if state["window"] is not None:
            window, owned = self._open(), self._own(loading=True)
            restore_window(window, state["window"], parameters, self._ranks)
            self._window = window
            owned.record()

    def _start(self) -> None:
        """What the constructor touches, once every rank has accepted the options."""
        if self._ranks is not None:
            self._ranks.disable_grad_sync(self)
        self._meter.arm(self._index, self._parameters())

    def _parameters(self) -> list[Tensor]:
        return self._tensors if self.optimizer is None else parameters_in(self.optimizer)

    def _add(self, loss: Any, items: Any, last: bool = False) -> Sums | None:
        """One micro-batch, for `backward`; its window's sums where that closed."""
        try:
            loss, items = check_loss(loss), check_items(items)
            check_flag("last", last)
            if isinstance(items, Tensor) and isinstance(self.every, Items):
                raise _items_on_device(self.every, items)
            if self._ranks is not None:
                self._ranks.check_window(self._owned)
        except (TypeError, ValueError, RuntimeError) as error:
            self._refuse(error, loss, last is True)
            raise
        if self._repeats:
            items = loss.new_zeros(())
        window = self._window or self._open(last)
        owned = self._owned or self._own()
        plan = window.micro_batches + 1 if last else self._plan
        self._meter.norms.clear()  # of backwards in between that were not a micro-batch's
        try:
            if self._ranks is not None:
                self._ranks.before(window, items, plan)
            owned.check()
            with owned:
                window.backward(loss, items, self._parameters() if window.dtype is not None else (), self.scaler)
            self._window = window
            window.repeats += self._repeats
            self._meter.take(window, items)
            full = self._is_full(window, plan) if self._ranks is None else self._ranks.full(window, plan)
            owned.record()
        except BaseException:
            self._drop()
            raise
        return self._sums(window) if full else None

    def _refuse(self, error: Exception, loss: Any, last: bool) -> None:
        """Reports to the other ranks that this one refuses its micro-batch. All drop the window, unless all refuse."""
        if self._ranks is not None:
            window = self._window or self._open()
            if self._ranks.shards is not None:
                self._owned = self._owned or self._own()
            if not self._ranks.refuse(error, window, loss, window.micro_batches + 1 if last else self._plan):
                self._drop()
            elif window.micro_batches:
                self._window = window

    def _is_full(self, window: Window, plan: Any) -> bool:
        if isinstance(plan, UntilNoise):
            return self._meter.is_enough(plan, window, self._parameters(), self.scaler)
        if isinstance(plan, Items):
            return bool(window.items >= plan.count)
        return window.micro_batches >= plan

    def _open(self, last: bool = False) -> Window:
        every = math.inf if self.every is None else self.every
        self._plan = every if isinstance(every, UntilNoise | float) else planned(every, self._index)
        if self._ranks is not None and callable(self.every):
            self._ranks.agree_to_open(self._index, self._plan)
        # A window of one micro-batch adds nothing up, and is autograd's to the bit.
        path = None if self._plan == 1 or last else self._fused_path
        return Window(
            planned=self._plan if isinstance(self._plan, int) and not last else 1,
            unit=self._plan.count if isinstance(self._plan, Items) else None,
            dtype=self._wide(),
            fused=path and path.window(self._parameters()),
        )

    def _own(self, loading: bool = False) -> Ownership:
        """From here on the gradients are the window's. Those that lie there go, as by zero_grad() before a window."""
        parameters, drop = self._parameters(), weakref.WeakMethod(self._drop)
        shards = None if self._ranks is None else self._ranks.shards
        owned = Ownership(self._owner, drop, parameters, instead=loading, in_grad=shards is None)
        lying = [p for p in parameters if p.grad is not None]
        unreduced = shards is not None and shards.has_unreduced()
        if not self._warned and (unreduced or any(p.grad not in self._left for p in lying)):
            self._warned = True
            try:
                warnings.warn(_DISCARDED, stacklevel=4)
            except BaseException:  # where warnings are errors
                owned.close()
                raise
        for p in lying:
            p.grad = None
        if unreduced and shards is not None:
            shards.forget()
        self._left.clear()
        self._owned, self._scaler_mark = owned, scaling.mark_of(self.scaler)
        return owned

    def _wide(self) -> torch.dtype | None:
        """What wide sums hold at least; None where gradients add up in `.grad`."""
        return self.dtype if is_wide(self._parameters(), self.dtype) else None

    def _verify(self, call: str = BACKWARD) -> None:
        """That no other code has changed what the open window owns. Ranks at the same `call` get an error too."""
        if self._owned is None:
            return
        with nullcontext() if self._ranks is None else self._ranks.meetings.reporting(call):
            self._owned.verify(self._parameters())
            scaling.check_mark(self.scaler, self._scaler_mark)

    def _release(self) -> None:
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def _begin(self) -> None:
        """After a window, and before the forward of the next one."""
        if self._ranks is not None and self._ranks.shards is not None:
            self._ranks.shards.forget()
        self._meter.arm(self._index, self._parameters())

    def _drop(self, foreign: Exception | None = None) -> None:
        """After an error: forgets the window. An error of a `foreign` call is reported to the other ranks here."""
        if foreign is not None and self._ranks is not None and self._ranks.shards is None:
            self._ranks.meetings.report(BACKWARD, foreign)
        self.reset()
        scaling.forget(self.scaler)

    def _sums(self, window: Window, totals: WindowTotals | None = None) -> Sums:
        """Closes the window, and adds up over the ranks.

        Args:
            window: the open one.
            totals: of all ranks, where they have met already.
        """
        try:
            if totals is None:
                self._verify()
            self._release()
            parameters = self._parameters()
            if self._ranks is not None:
                terms = window_terms(self, self._plan)
                totals = totals or self._ranks.reduce_totals(BACKWARD, window, parameters, terms)
                totals = self._ranks.reduce(window, parameters, totals)
            return Sums(window, window.gradients(parameters), totals)
        except BaseException:
            self._drop()
            raise

    def _join_window(self, ranks: Ranks, partial: str = "apply") -> tuple[Sums | None, WindowTotals, bool]:
        """At the end of this rank's data: takes part in the ranks' next window.

        Args:
            ranks: all of them.
            partial: what becomes of a window at the end of every rank's data: "apply" closes it.

        Returns:
            Its sums, or None where it was not closed; what it holds; and whether every rank is at the end of its data.
        """
        try:
            window, _ = self._window or self._open(), self._owned or self._own()
            self._verify(FLUSH)
            terms = window_terms(self, self._plan)
            totals, last = ranks.join(window, self._parameters(), self._plan, terms)
        except BaseException:
            self._drop()
            raise
        if totals.micro_batches and (partial == "apply" or not last):
            return self._sums(window, totals), totals, last
        if not totals.micro_batches and self._window is None:
            self._release()
        return None, totals, last

    def _leave_mean(self, sums: Sums) -> Update:
        """Makes the mean of the sums, and leaves it in `.grad` for the caller."""
        window, gradients, _ = sums
        try:
            norm = whole(get_total_norm(gradients)) if self._norm else torch.tensor(math.nan)
            if self.scaler is not None:
                norm = norm / self.scaler.get_scale()
            totals = sums.read()
            noise = self._meter.noise(totals, norm, self.scaler, self._ranks)
            mean_norm = (norm * totals.factor).item()
            update = Update(self._index, totals.micro_batches, totals.items, totals.loss, mean_norm, noise=noise)
            reason = why_skipped(update, gradients, "apply")
            if reason is not None:
                self.reset()
                return replace(update, skipped=reason)
            self._meter.scale.add(noise)
            scale_(gradients, totals.factor)
            window.round_into_grad()
        except BaseException:
            self._drop()
            raise
        self._window = None
        self._index += 1
        self._left.update({p.grad: True for p in self._parameters() if p.grad is not None})
        self._begin()
        return update


def _items_on_device(every: Items, items: Tensor) -> TypeError:
    return TypeError(
        f"every={every} counts on the host. {errors.received('items', items)} "
        "Pass a number, or a number of micro-batches as every."
    )
