"""The stream API: your loader yields micro-batches, and bigbatch stands where PyTorch applies a gradient."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bigbatch import errors
from bigbatch.engines.torch_fsdp import whole
from bigbatch.every import Every
from bigbatch.noise import NoiseScale, UntilNoise
from bigbatch.torch import scaling
from bigbatch.torch.checks import check_optimizer, check_scaler, check_scheduler
from bigbatch.torch.collectives import FLUSH, MAKING
from bigbatch.torch.gradients import Gradients, Sums
from bigbatch.torch.norms import get_total_norm
from bigbatch.torch.optimizers import name_of, parameters_in
from bigbatch.torch.terms import gradient_terms, update_terms
from bigbatch.torch.update import Update as Update
from bigbatch.torch.update import unfinished, why_skipped
from bigbatch.torch.window import WindowTotals, scale_
from bigbatch.torch.wrapped import Sync, ranks_of

T = TypeVar("T")


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
        optimizer: Optimizer | Sequence[Optimizer],
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
        ranks = ranks_of(model, sync, MAKING)
        with nullcontext({}) if ranks is None else ranks.agreeing(MAKING) as terms:
            self.optimizer: Any = check_optimizer(optimizer)
            self.clip_norm = errors.check_clip_norm(clip_norm)
            self.scheduler = check_scheduler(scheduler, parameters_in(self.optimizer))
            check_scaler(scaler, nonfinite)
            self.partial = errors.check_choice("partial", partial, ("apply", "carry", "drop"))
            self.nonfinite = errors.check_choice("nonfinite", nonfinite, ("skip", "raise", "apply"))
            self._gradients = Gradients(
                optimizer, every, model=ranks, sync=sync, dtype=dtype, fused=fused, scaler=scaler, noise=noise
            )
            self._gradients._owner = "an Accumulator"
            if ranks is not None:
                terms.update(gradient_terms(self._gradients, ranks, sync, noise) | update_terms(self))
        if ranks is not None:
            self._gradients._start()

    @property
    def every(self) -> Any:
        """When a window closes. Another one counts from the next window on."""
        return self._gradients.every

    @every.setter
    def every(self, every: Any) -> None:
        """Takes effect when the next window opens."""
        self._gradients.every = every

    @property
    def scaler(self) -> Any:
        """The GradScaler, or None."""
        return self._gradients.scaler

    @property
    def pending(self) -> int:
        """How many micro-batches the open window holds."""
        return self._gradients.pending

    @property
    def index(self) -> int:
        """How many updates have been made, and so the index of the next."""
        return self._gradients.index

    @property
    def noise_scale(self) -> NoiseScale:
        """The running gradient noise scale, of the windows that were measured."""
        return self._gradients.noise_scale

    def __repr__(self) -> str:
        given = {"clip_norm": self.clip_norm, "scheduler": self.scheduler, "scaler": self.scaler}
        options = "".join(
            f", {name}={value if isinstance(value, float | int) else type(value).__name__}"
            for name, value in given.items()
            if value is not None
        )
        every = getattr(self.every, "__name__", self.every)
        state = f"{self.index} updates made, {self.pending} micro-batches pending"
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
        sums = self._gradients._add(loss, items)
        return None if sums is None else self._update(sums)

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
        return self._gradients.join(loader)

    def flush(self) -> Update | None:
        """Ends a window that is not full, as `partial` says: at the end of an epoch, or of the data.

        Returns:
            None where nothing was pending. Otherwise the Update; with `partial` "carry" or "drop" its `skipped` is set.

        Across ranks it also is the join: a rank that calls it takes part in the windows of those that have more data,
        until all have called it. It returns the last Update.
        """
        if self._gradients._ranks is not None:
            return self._flush_together(self._gradients._ranks)
        window = self._gradients._window
        if window is None:
            return None
        if self.partial == "apply":
            return self._update(self._gradients._sums(window))
        return self._leave_unfinished(window.close())

    def _flush_together(self, ranks: Any) -> Update | None:
        update, last = None, False
        while not last:
            sums, totals, last = self._gradients._join_window(ranks, self.partial)
            if sums is not None:
                update = self._update(sums)
            elif totals.micro_batches:
                return self._leave_unfinished(totals)
            else:
                break
        return update

    def _leave_unfinished(self, totals: WindowTotals) -> Update:
        """Carries or drops a window that is not full."""
        grads = self._gradients
        if self.partial == "drop":
            self.reset()
            return unfinished(self.index, totals, self.partial)
        try:
            grads._verify(FLUSH)
        except BaseException:
            grads._drop()
            raise
        if grads._window is None:  # this rank has none of its micro-batches
            grads._release()
        return unfinished(self.index, totals, self.partial)

    def reset(self) -> None:
        """Forgets the open window: its gradients go, and the next `backward` starts a new one."""
        self._gradients.reset()

    def state_dict(self) -> dict[str, Any]:
        """The count of updates and the open window, as plain numbers and tensors; the latter are not copies.

        Inside a window every rank has its own part, and saves it; where none is open, all have the same state.
        `torch.load(..., weights_only=True)` reads it back. Save the model, optimizer, scheduler and scaler beside it.
        """
        return self._gradients.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was called, inside a window too, bit for bit.

        Raises:
            ValueError: the state is of other parameters, damaged, or no state at all; it names the entry. Nothing was
                touched, and the open window is as it was.
        """
        self._gradients.load_state_dict(state)

    def _update(self, sums: Sums) -> Update:
        """One update from a window's sums; then, whatever happened, no gradients."""
        grads, window, gradients = self._gradients, sums.window, sums.gradients
        try:
            with scaling.unscaled(self.scaler, self.optimizer, gradients) as scaler:
                norm = whole(get_total_norm(gradients))
                totals = sums.read()  # here the host waits
                noise = grads._meter.noise(totals, norm, scaler, grads._ranks)
                norm = norm * totals.factor
                update = Update(self.index, totals.micro_batches, totals.items, totals.loss, norm.item(), noise=noise)
                reason = why_skipped(update, gradients, self.nonfinite)
                if reason is not None:
                    return replace(update, skipped=reason)
                grads._meter.scale.add(noise)
                scale_(gradients, totals.factor * self._clipping(norm))
                window.round_into_grad()
                self._step(scaler)
                return update
        except BaseException:
            scaling.forget(self.scaler)
            raise
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
        self._gradients._index += 1
