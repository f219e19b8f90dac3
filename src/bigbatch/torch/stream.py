"""The stream API: your loader yields micro-batches, and bigbatch stands where PyTorch applies a gradient."""

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bigbatch import errors
from bigbatch.engines.torch_dtypes import is_wide
from bigbatch.engines.torch_fsdp import whole
from bigbatch.every import Every, Items, as_every, planned
from bigbatch.noise import NoiseScale, UntilNoise
from bigbatch.torch import scaling
from bigbatch.torch.checkpoint import check_state, restore_window, window_state
from bigbatch.torch.checks import (
    check_dtype,
    check_flag,
    check_items,
    check_loss,
    check_optimizer,
    check_scaler,
    check_scheduler,
)
from bigbatch.torch.collectives import BACKWARD, FLUSH, LOAD, MAKING
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.noise import Meter
from bigbatch.torch.optimizers import name_of
from bigbatch.torch.ownership import Ownership
from bigbatch.torch.terms import option_terms, state_terms, window_terms
from bigbatch.torch.update import Update as Update
from bigbatch.torch.update import unfinished, why_skipped
from bigbatch.torch.window import Window, WindowTotals, fused_path, scale_
from bigbatch.torch.wrapped import Sync, ranks_of

T = TypeVar("T")

_DISCARDED = (
    "Gradients lay in .grad when a window opened, and were discarded, as by zero_grad() at the top of a loop. Whatever "
    "left them (an earlier backward, a learning-rate finder, bb.backward) should call zero_grad() when it is done."
)


class Accumulator:
    """Makes one update of `optimizer` from the gradients of many micro-batches.

    It takes the place of `loss.backward()`, `optimizer.step()` and `optimizer.zero_grad()`::

        acc = bb.Accumulator(optimizer, every=64, clip_norm=1.0)
        for x, y in loader:
            update = acc.backward(loss_fn(model(x), y), items=len(x))
        acc.flush()

    The update is the big batch's: the mean over all items, clipped, scheduled and decayed once. Between windows
    `.grad` is None; inside one it is the window's, part of whose sums may lie elsewhere. Gradients that lie there when
    a window opens are discarded, with one warning. A step, backward, zero_grad or clipping by other code inside an
    open window, and any other write to its gradients or parameters, raises RuntimeError and drops the window.

    Args:
        optimizer: any `torch.optim.Optimizer` whose `step` needs no closure, or a list of several that share no
            parameter (Muon for matrices, AdamW for the rest): they make one update, clipped together.
        every: when a window closes. A number of micro-batches; a callable that takes the update's index and returns
            one (batch-size warm-up); `bb.items(4096)`; or `bb.until_noise(at_most=256)`.
        clip_norm: clips the mean gradient to this 2-norm, as `clip_grad_norm_` would the big batch's.
        scheduler: stepped once an update; or a list of several. Its `step` must need no argument.
        scaler: a `torch.amp.GradScaler`, which unscales once a window and skips a window that overflowed.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 parameters add up in float32
            and are rounded once, for the optimizer. None adds up in the parameters' own dtype.
        partial: what `flush` does with a window that is not full: "apply" makes the update from what is there,
            "carry" keeps it open, "drop" forgets it.
        nonfinite: what becomes of a window whose loss or gradient is inf or NaN: "skip" makes no update, "raise"
            raises FloatingPointError, "apply" applies it. The next window is clean in any case but the last.
        model: the DistributedDataParallel or fully_shard model that the losses come from, where several ranks train
            one model; its own reduction is switched off from here on. `every` then counts each rank's micro-batches, or
            with `bb.items` the items of all; see `bigbatch.torch.distributed`. Making the Accumulator, closing a
            window, `flush` and `load_state_dict` are then collective, and an error that one rank raises there is one on
            all.
        sync: when a fully_shard model adds up over the ranks: once a "window" (fewest bytes, the default), or every
            "micro_batch" (least memory). Refused with other models, which do so once a window.
        fused: whether the gradients of weights that inputs are multiplied by, or rows are looked up in, go straight
            into the sums where that is safe (docs/pytorch.md). False leaves all to autograd: slower, and the same
            numbers.
        noise: measures the gradient noise scale, for `noise_scale` and the `noise` of an Update. True measures one
            window in twenty, an integer n one in n; such a window takes the norm of every micro-batch's gradient.

    Raises:
        TypeError, ValueError: an argument is not as described; nothing was touched.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        every: Every | UntilNoise,
        *,
        clip_norm: float | None = None,
        scheduler: LRScheduler | None = None,
        scaler: torch.amp.GradScaler | None = None,
        dtype: torch.dtype | None = torch.float32,
        partial: Literal["apply", "carry", "drop"] = "apply",
        nonfinite: Literal["skip", "raise", "apply"] = "skip",
        model: torch.nn.Module | None = None,
        sync: Sync | None = None,
        fused: bool = True,
        noise: bool | int = False,
    ):
        self._ranks = ranks_of(model, sync, MAKING)
        with nullcontext({}) if self._ranks is None else self._ranks.agreeing(MAKING) as terms:
            self.optimizer: Any = check_optimizer(optimizer)
            self.every = every if isinstance(every, UntilNoise) else as_every(every)
            self.clip_norm = errors.check_clip_norm(clip_norm)
            self.scheduler = check_scheduler(scheduler, self._parameters())
            self.scaler = check_scaler(scaler, nonfinite)
            self.dtype = check_dtype(dtype)
            self.partial = errors.check_choice("partial", partial, ("apply", "carry", "drop"))
            self.nonfinite = errors.check_choice("nonfinite", nonfinite, ("skip", "raise", "apply"))
            self.fused = check_flag("fused", fused)
            scaling.check_width(scaler, self._parameters(), dtype)
            self._meter = Meter(every, noise)
            if self._ranks is not None:
                self._ranks.check(every, noise, scaler)
                terms.update(option_terms(self, self._ranks, sync, noise))
        if self._ranks is not None:
            self._ranks.disable_grad_sync(self)
        fusible = self.fused and (self._ranks is None or self._ranks.shards is None)
        self._fused_path = fused_path(in_ranks=self._ranks is not None) if fusible else None
        self._index = 0
        self._plan: int | Items | UntilNoise = 0  # of the open window
        self._window: Window | None = None
        self._owned: Ownership | None = None
        self._scaler_mark: Any = None
        self._warned = self._repeats = False
        self._meter.arm(self._index, self._parameters())

    @property
    def pending(self) -> int:
        """How many micro-batches the open window holds."""
        return 0 if self._window is None else self._window.micro_batches

    @property
    def index(self) -> int:
        """How many updates have been made, and so the index of the next."""
        return self._index

    @property
    def noise_scale(self) -> NoiseScale:
        """The running gradient noise scale, of the windows that were measured."""
        return self._meter.scale

    def __repr__(self) -> str:
        given = {"clip_norm": self.clip_norm, "scheduler": self.scheduler, "scaler": self.scaler}
        options = "".join(
            f", {name}={value if isinstance(value, float | int) else type(value).__name__}"
            for name, value in given.items()
            if value is not None
        )
        every = getattr(self.every, "__name__", self.every)
        state = f"{self._index} updates made, {self.pending} micro-batches pending"
        return f"Accumulator({name_of(self.optimizer)}, every={every}{options}: {state})"

    def backward(self, loss: Tensor, *, items: float | Tensor) -> Update | None:
        """Takes one micro-batch in: differentiates its loss, and makes the update if that fills the window.

        Args:
            loss: the micro-batch's mean loss, a real scalar that requires a gradient.
            items: what the mean is over: a number of examples or tokens above zero, or a tensor of one element on
                the device (`(labels != -100).sum()`), which needs no synchronisation. 0 in it counts for nothing,
                where the loss has a gradient of zero then, as `cross_entropy` has; a 0/0 of your own has NaN.

        Returns:
            The Update if this micro-batch filled the window, else None.

        Raises:
            TypeError, ValueError: the loss or `items` is not as described; the window stays as it was.
            FloatingPointError: with `nonfinite="raise"`, the window came out inf or NaN; it was dropped.
            RuntimeError: other code has changed the window's gradients or parameters; it was dropped.

        Any error of autograd's or the optimizer's drops the open window, as `reset` does, and goes on to the caller.
        An error in your own forward, before the call, leaves the window as it was.

        The host waits for the device when the window closes. Inside a window it does so where `until_noise` looks at
        the noise, and where a weight's product is compared with autograd's gradient for the first time.
        """
        try:
            loss, items = check_loss(loss), check_items(items)
            if isinstance(items, Tensor) and isinstance(self.every, Items):
                raise TypeError(
                    f"every={self.every} counts on the host. {errors.received('items', items)} "
                    "Pass a number, or a number of micro-batches as every."
                )
            if self._ranks is not None:
                self._ranks.check_window(self._owned)
        except (TypeError, ValueError, RuntimeError) as error:
            self._refuse(error, loss)
            raise
        if self._repeats:
            items = loss.new_zeros(())
        window = self._window or self._open()
        owned = self._owned or self._own()
        self._meter.norms.clear()  # of backwards in between that were not a micro-batch's
        try:
            if self._ranks is not None:
                self._ranks.before(window, items, self._plan)
            with owned:
                window.backward(loss, items, self._parameters() if window.dtype is not None else (), self.scaler)
            self._window = window
            window.repeats += self._repeats
            self._meter.take(window, items)
            full = self._is_full(window) if self._ranks is None else self._ranks.full(window, self._plan)
            owned.record()
            return self._close(window) if full else None
        except BaseException:
            self._drop()
            raise

    def _refuse(self, error: Exception, loss: Any) -> None:
        """Reports to the other ranks that this one refuses its micro-batch. All drop the window, unless all refuse."""
        if self._ranks is not None:
            window = self._window or self._open()
            if self._ranks.shards is not None:
                self._owned = self._owned or self._own()
            if not self._ranks.refuse(error, window, loss, self._plan):
                self._drop()
            elif window.micro_batches:
                self._window = window

    def join(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's micro-batches, for ranks of a fully_shard model that have unequally many of them.

        A forward of such a model needs all ranks. So a rank at the end of its data repeats its last micro-batch until
        the others are there too, and what `backward` is given of it counts for nothing::

            for x, y in acc.join(loader):
                acc.backward(loss_fn(model(x), y), items=len(x))
            acc.flush()

        The ranks tell each other before each micro-batch whether they have one. Elsewhere it is the loader itself: with
        DistributedDataParallel `flush` is the join.

        Raises:
            ValueError: on every rank, where one has no micro-batch at all.
        """
        if self._ranks is None or self._ranks.shards is None:
            yield from loader
            return
        try:
            for micro_batch, repeated in self._ranks.in_step(loader):
                self._repeats = repeated
                yield micro_batch
        finally:
            self._repeats = False

    def flush(self) -> Update | None:
        """Ends a window that is not full, as `partial` says: at the end of an epoch, or of the data.

        Returns:
            None where nothing was pending. Otherwise the Update; with `partial` "carry" or "drop" its `skipped` is set.

        Across ranks it also is the join: a rank that calls it takes part in the windows of those that have more data,
        until all have called it. It returns the last Update.
        """
        if self._ranks is not None:
            return self._flush_together(self._ranks)
        window = self._window
        if window is None:
            return None
        try:
            return self._close(window) if self.partial == "apply" else self._leave_unfinished(window.close())
        except BaseException:
            self._drop()
            raise

    def _flush_together(self, ranks: Ranks) -> Update | None:
        update, last = None, False
        try:
            while not last:
                window, _ = self._window or self._open(), self._owned or self._own()
                self._verify(FLUSH)
                totals, last = ranks.join(window, self._parameters(), self._plan, window_terms(self, self._plan))
                if totals.micro_batches == 0:
                    break
                if last and self.partial != "apply":
                    return self._leave_unfinished(totals)
                update = self._close(window, totals)
        except BaseException:
            self._drop()
            raise
        if self._window is None:
            self._release()
        return update

    def _leave_unfinished(self, totals: WindowTotals) -> Update:
        """Carries or drops a window that is not full."""
        if self.partial == "carry":
            self._verify(FLUSH)
            if self._window is None:  # this rank has none of its micro-batches
                self._release()
        else:
            self.reset()
        return unfinished(self._index, totals, self.partial)

    def reset(self) -> None:
        """Forgets the open window: its gradients go, and the next `backward` starts a new one."""
        self._release()
        self._window = None
        self.optimizer.zero_grad(set_to_none=True)
        if self._ranks is not None and self._ranks.shards is not None:
            self._ranks.shards.forget()
        self._meter.arm(self._index, self._parameters())

    def state_dict(self) -> dict[str, Any]:
        """The count of updates and the open window, as plain numbers and tensors; the latter are not copies.

        Inside a window every rank has its own part, and saves it; where none is open, all have the same state.
        `torch.load(..., weights_only=True)` reads it back. Save the model, optimizer, scheduler and scaler beside it.
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

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _own(self, loading: bool = False) -> Ownership:
        """From here on the gradients are the window's. Those that lie there go, as by zero_grad() before a window."""
        parameters, drop = self._parameters(), weakref.WeakMethod(self._drop)
        shards = None if self._ranks is None else self._ranks.shards
        owned = Ownership("an Accumulator", drop, parameters, instead=loading, in_grad=shards is None)
        if any(p.grad is not None for p in parameters) or (shards is not None and shards.has_unreduced()):
            if not self._warned:
                self._warned = True
                try:
                    warnings.warn(_DISCARDED, stacklevel=3)
                except BaseException:  # where warnings are errors
                    owned.close()
                    raise
            self.optimizer.zero_grad(set_to_none=True)
            if shards is not None:
                shards.forget()
        self._owned, self._scaler_mark = owned, scaling.mark_of(self.scaler)
        return owned

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

    def _drop(self, foreign: Exception | None = None) -> None:
        """After an error: forgets the window. An error of a `foreign` call is reported to the other ranks here."""
        if foreign is not None and self._ranks is not None and self._ranks.shards is None:
            self._ranks.meetings.report(BACKWARD, foreign)
        self.reset()
        scaling.forget(self.scaler)

    def _wide(self) -> torch.dtype | None:
        """What wide sums hold at least; None where gradients add up in `.grad`."""
        return self.dtype if is_wide(self._parameters(), self.dtype) else None

    def _open(self) -> Window:
        self._plan = self.every if isinstance(self.every, UntilNoise) else planned(self.every, self._index)
        if self._ranks is not None and callable(self.every):
            self._ranks.agree_to_open(self._index, self._plan)
        # A window of one micro-batch adds nothing up, and is autograd's to the bit.
        path = None if self._plan == 1 else self._fused_path
        return Window(
            planned=self._plan if isinstance(self._plan, int) else 1,
            unit=self._plan.count if isinstance(self._plan, Items) else None,
            dtype=self._wide(),
            fused=path and path.window(self._parameters()),
        )

    def _is_full(self, window: Window) -> bool:
        if isinstance(self._plan, UntilNoise):
            return self._meter.is_enough(self._plan, window, self._parameters(), self.scaler)
        if isinstance(self._plan, Items):
            return bool(window.items >= self._plan.count)
        return window.micro_batches >= self._plan

    def _close(self, window: Window, totals: WindowTotals | None = None) -> Update:
        """One update from the window's sums; then, whatever happened, no gradients and no window.

        Args:
            window: the open one.
            totals: of all ranks, where they have met already.
        """
        if totals is None:
            self._verify()
        self._release()
        parameters = self._parameters()
        if self._ranks is not None:
            terms = window_terms(self, self._plan)
            totals = totals or self._ranks.reduce_totals(BACKWARD, window, parameters, terms)
            totals = self._ranks.reduce(window, parameters, totals)
        gradients = window.gradients(parameters)
        try:
            with scaling.unscaled(self.scaler, self.optimizer, gradients) as scaler:
                norm = whole(torch.nn.utils.get_total_norm(gradients))
                totals = totals or window.close()  # here the host waits
                noise = self._meter.noise(totals, norm, scaler, self._ranks)
                norm = norm * totals.factor
                update = Update(
                    self._index, totals.micro_batches, totals.items, totals.loss, norm.item(), noise=noise
                )  # fmt: skip
                reason = why_skipped(update, gradients, self.nonfinite)
                if reason is not None:
                    return replace(update, skipped=reason)
                self._meter.scale.add(noise)
                scale_(gradients, totals.factor * self._clipping(norm))
                window.round_into_grad()
                self._step(scaler)
                return update
        finally:
            self.reset()

    def _clipping(self, norm: Tensor) -> float:
        """What the mean gradient is multiplied by so that its norm is at most `clip_norm`."""
        if self.clip_norm is None:
            return 1.0
        # clip_grad_norm_'s own formula, so that a window of one is clipped to the same bits.
        return torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0).item()

    def _step(self, scaler: Any) -> None:
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
        if self.scheduler is not None:
            self.scheduler.step()
        self._index += 1
