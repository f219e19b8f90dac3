"""The stream door: your loader yields micro-batches, and bigbatch stands where PyTorch applies a gradient."""

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bigbatch import errors
from bigbatch.every import Every, Items, as_every, planned
from bigbatch.fused import torch_graph
from bigbatch.fused.torch_deferred import Products
from bigbatch.fused.torch_graph import gradient_dtype
from bigbatch.fused.torch_proof import Proof
from bigbatch.noise import Noise, NoiseScale, UntilNoise
from bigbatch.torch.checkpoint import check_state, held, restore
from bigbatch.torch.checks import (
    check_dtype,
    check_flag,
    check_items,
    check_loss,
    check_optimizer,
    check_scaler,
    check_scheduler,
)
from bigbatch.torch.collectives import BACKWARD, FLUSH, LOAD, MAKING, Met
from bigbatch.torch.distributed import Ranks
from bigbatch.torch.fsdp import whole
from bigbatch.torch.noise import Meter
from bigbatch.torch.ownership import Ownership
from bigbatch.torch.several import name_of
from bigbatch.torch.terms import made_with, window_terms
from bigbatch.torch.window import Sums, Window, is_wide, scale_
from bigbatch.torch.wrapped import Sync, ranks_of

T = TypeVar("T")

_DISCARDED = (
    "Gradients lay in .grad when a window opened, and were discarded, as by zero_grad() at the top of a loop. Whatever "
    "left them (an earlier backward, a learning-rate finder, bb.backward) should call zero_grad() when it is done."
)


@dataclass(frozen=True, slots=True)
class Update:
    """What one window came to. Plain numbers, so that a logger can take `dataclasses.asdict(update)`.

    Attributes:
        index: the update's index, from 0; a skipped window leaves it for the next.
        micro_batches: how many micro-batches the window held.
        items: the examples or tokens that they counted for.
        loss: the window's mean loss over items.
        grad_norm: the 2-norm of the window's mean gradient, before clipping.
        skipped: why no update was made, or None where it was.
        noise: what the window says of the gradient's noise, where it was measured.
    """

    index: int
    micro_batches: int
    items: float
    loss: float
    grad_norm: float
    skipped: str | None = None
    noise: Noise | None = None


class Accumulator:
    """Makes one update of `optimizer` from the gradients of many micro-batches.

    It takes the place of `loss.backward()`, `optimizer.step()` and `optimizer.zero_grad()`::

        acc = bb.Accumulator(optimizer, every=64, clip_norm=1.0)
        for x, y in loader:
            update = acc.backward(loss_fn(model(x), y), items=len(x))
        acc.flush()

    The update is the big batch's: the mean over all items, clipped, scheduled and decayed once. Between windows
    `.grad` is None; inside one it is the window's, part of whose sums may lie elsewhere. Gradients that lie there when
    a window opens are discarded, with one warning. A step, backward, zero_grad or clipping of somebody else's inside an
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
            one model; its own reduction is put off from here on. `every` then counts each rank's micro-batches, or
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
            if scaler is not None and is_wide(self._parameters(), dtype):
                raise ValueError(
                    "scaler unscales gradients that are as wide as the accumulation. "
                    f"Received: parameters of {self._narrowest()} and dtype={dtype}. "
                    "Keep the parameters in float32 under autocast, or leave the scaler out."
                )
            self._index = 0
            self._window: Window | None = None
            self._owned: Ownership | None = None
            self._unscaled: Any = None  # what the scaler notes of optimizers until its next update()
            self._warned = False
            self._repeats = self._products = False
            self._proof = Proof(started=True)
            self._plan: int | Items | UntilNoise = 0
            self._meter = Meter(every, noise)
            if self._ranks is not None:
                self._ranks.check(every, noise, scaler)
                terms.update(made_with(self, self._ranks, sync, noise))
        if self._ranks is not None:
            self._ranks.defer_for(self)
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
                the device (`(labels != -100).sum()`), whose value is then not waited for. 0 in it counts for nothing,
                where the loss has a gradient of zero then, as `cross_entropy` has; a 0/0 of your own has NaN.

        Returns:
            The Update if this micro-batch filled the window, else None.

        Raises:
            TypeError, ValueError: the loss or `items` is not as described; the window stays as it was.
            FloatingPointError: with `nonfinite="raise"`, the window came out inf or NaN; it was dropped.
            RuntimeError: somebody else has moved the window's gradients or parameters; it was dropped.

        Any error of autograd's or the optimizer's drops the open window, as `reset` does, and goes on to the caller.
        An error in your own forward, before the call, leaves the window as it was.

        The host waits for the device when the window closes. Inside a window it does so for the looks of
        `until_noise`, and where a weight's product is compared with autograd's gradient for the first time.
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
            graph = torch_graph.read(loss, self._proof, window.micro_batches == 0) if self._products else None
            if window.micro_batches == 0 and graph is not None:
                self._products = graph.has_products  # the next micro-batches' are hardly others
            with owned:
                window.backward(loss, items, self._parameters() if window.dtype is not None else (), self.scaler, graph)
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
        """Tells the other ranks that this one cannot take its micro-batch. Unless none has gone on, all drop theirs."""
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
            None where nothing was pending. Otherwise the Update; with `partial` "carry" or "drop", one that was
            skipped and says so.

        Across ranks it also is the join: a rank that is here takes part in the windows of those that have more data,
        until all are here. It returns the last Update.
        """
        if self._ranks is not None:
            return self._flush_together(self._ranks)
        window = self._window
        if window is None:
            return None
        try:
            return self._close(window) if self.partial == "apply" else self._leave(window.close())
        except BaseException:
            self._drop()
            raise

    def _flush_together(self, ranks: Ranks) -> Update | None:
        update, last = None, False
        try:
            while not last:
                window, _ = self._window or self._open(), self._owned or self._own()
                self._verify(FLUSH)
                met, last = ranks.wait(window, self._parameters(), self._plan, window_terms(self, self._plan))
                if met.sums.micro_batches == 0:
                    break
                if last and self.partial != "apply":
                    return self._leave(met.sums)
                update = self._close(window, met)
        except BaseException:
            self._drop()
            raise
        if self._window is None:
            self._release()
        return update

    def _leave(self, sums: Sums) -> Update:
        """A window that is not full, carried or dropped."""
        held = f"{sums.micro_batches} micro-batches of a partial window"
        if self.partial == "carry":
            self._verify(FLUSH)
            if self._window is None:  # a rank that held none of them
                self._release()
            return self._report(sums, math.nan, f"carried: {held} wait for more")
        self.reset()
        return self._report(sums, math.nan, f"dropped: {held}")

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
            "window": None if window is None else held(window, parameters, self._ranks),
            "noise": self._meter.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken, inside a window too, bit for bit.

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
                terms.update(self._ranks.loaded(state))
        self._index = state["index"]
        self.reset()
        self._meter.load_state_dict(state.get("noise"))  # older states have none
        if state["window"] is not None:
            window, owned = self._open(), self._own(loading=True)
            restore(window, state["window"], parameters, self._ranks)
            self._window = window
            owned.record()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _own(self, loading: bool = False) -> Ownership:
        """From here on the gradients are the window's. Those that lie there go, as by zero_grad() before a window."""
        parameters, drop = self._parameters(), weakref.WeakMethod(self._drop)
        shards = None if self._ranks is None else self._ranks.shards
        owned = Ownership("an Accumulator", drop, parameters, instead=loading, in_grad=shards is None)
        if any(p.grad is not None for p in parameters) or (shards is not None and shards.hold_gradients()):
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
        self._owned = owned
        # A new one after each update(), and no public name tells of that; a test fails when it moves. `unscale_` writes
        # to gradients without counting up their `_version`, and itself refuses to be called twice.
        self._unscaled = getattr(self.scaler, "_per_optimizer_states", None)
        return owned

    def _verify(self, call: str = BACKWARD) -> None:
        """That nobody else has moved what the open window owns. Other ranks learn of it, where `call` is theirs too."""
        if self._owned is None:
            return
        with nullcontext() if self._ranks is None else self._ranks.meetings.reporting(call):
            self._owned.verify(self._parameters())
            if self._unscaled is not getattr(self.scaler, "_per_optimizer_states", None):
                raise RuntimeError(
                    "scaler.update() was called inside an open window, whose losses have been multiplied by the scale "
                    "from before. Remove it, and unscale_(): the Accumulator calls both once a window. Two "
                    "Accumulators need a GradScaler each. The window was dropped; the parameters and the optimizer are "
                    "as they were."
                )

    def _release(self) -> None:
        if self._owned is not None:
            self._owned.close()
            self._owned = None

    def _drop(self, foreign: Exception | None = None) -> None:
        """After an error: forgets the window, and what a scaler may have noted of it, at the scale that it has.

        Where the error is raised outside a call of ours, at a `foreign` one, the other ranks learn of it here.
        """
        if foreign is not None and self._ranks is not None and self._ranks.shards is None:
            self._ranks.meetings.report(BACKWARD, foreign)
        self.reset()
        if self.scaler is not None:
            state = self.scaler.state_dict()
            with suppress(AssertionError, IndexError):  # nothing was noted
                self.scaler.update()
                self.scaler.load_state_dict(state)

    def _wide(self) -> torch.dtype | None:
        """What wide sums hold at least; None where gradients add up in `.grad`."""
        return self.dtype if is_wide(self._parameters(), self.dtype) else None

    def _narrowest(self) -> torch.dtype:
        return min((p.dtype for p in self._parameters()), key=lambda dtype: dtype.itemsize)

    def _open(self) -> Window:
        self._plan = self.every if isinstance(self.every, UntilNoise) else planned(self.every, self._index)
        if self._ranks is not None and callable(self.every):
            self._ranks.agree_to_open(self._index, self._plan)
        dtype = self._wide()
        if isinstance(self._plan, Items):
            window = Window(unit=self._plan.count, dtype=dtype)
        else:
            window = Window(planned=self._plan if isinstance(self._plan, int) else 1, dtype=dtype)
        self._products = self._plan != 1 and self._takes_products()
        if self._products:
            window.products = Products(torch_graph.may_take(self._parameters()))
        return window

    def _takes_products(self) -> bool:
        """Whether it is worth looking for weights' gradients in each loss's graph, and safe to take them."""
        free = torch_graph.is_alone() if self._ranks is None else self._ranks.shards is None
        return self.fused and free and any(map(torch_graph.is_worth, self._parameters()))

    def _is_full(self, window: Window) -> bool:
        if isinstance(self._plan, UntilNoise):
            return self._meter.is_enough(self._plan, window, self._parameters(), self.scaler)
        if isinstance(self._plan, Items):
            return bool(window.items >= self._plan.count)
        return window.micro_batches >= self._plan

    def _close(self, window: Window, met: Met | None = None) -> Update:
        """One update from the window's sums; then, whatever happened, no gradients and no window."""
        if met is None:
            self._verify()
        self._release()
        sums = None
        if self._ranks is not None:
            terms = window_terms(self, self._plan)
            met = met or self._ranks.meet(BACKWARD, window, self._parameters(), terms)
            sums = self._ranks.reduce(window, self._parameters(), met)
        gradients = window.gradients(self._parameters())
        # Without a gradient a scaler has recorded nothing, and would refuse to go on.
        scaler = self.scaler if gradients else None
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        try:
            norm = whole(torch.nn.utils.get_total_norm(gradients))
            sums = sums or window.close()  # here the host waits
            noise = self._meter.noise(sums, norm, scaler, self._ranks)
            norm = norm * sums.factor
            update = replace(self._report(sums, norm.item()), noise=noise)
            skipped = self._reason_to_skip(update, gradients)
            if skipped is not None:
                return replace(update, skipped=skipped)
            self._meter.scale.add(noise)
            factor = sums.factor
            if self.clip_norm is not None:
                # clip_grad_norm_'s own formula, so that a window of one is clipped to the same bits.
                factor *= torch.clamp(self.clip_norm / (norm + 1e-6), max=1.0).item()
            scale_(gradients, factor)
            while window.sums:
                p, mean = window.sums.popitem()
                p.grad = mean.to(gradient_dtype(p))
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
            if self.scheduler is not None:
                self.scheduler.step()
            self._index += 1
            return update
        finally:
            if scaler is not None:
                scaler.update()
            self.reset()

    def _report(self, sums: Sums, norm: float, skipped: str | None = None) -> Update:
        return Update(self._index, sums.micro_batches, sums.items, sums.loss, norm, skipped)

    def _reason_to_skip(self, update: Update, gradients: list[Tensor]) -> str | None:
        if not math.isfinite(update.items):
            reason = f"a micro-batch's items were negative, NaN or infinite: all together are {update.items}"
            if self.nonfinite == "raise":
                raise FloatingPointError(f"{reason}. The parameters and the optimizer are as they were.")
            return reason
        if update.items == 0:
            return "the window holds no items"
        if not gradients:
            return "no parameter of the optimizer got a gradient"
        if math.isfinite(update.loss) and math.isfinite(update.grad_norm):
            return None
        if self.nonfinite == "apply":
            return None
        reason = f"the window is not finite: loss {update.loss}, gradient norm {update.grad_norm}"
        if self.nonfinite == "raise":
            raise FloatingPointError(f"{reason}. The parameters and the optimizer are as they were.")
        return reason
