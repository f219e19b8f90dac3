"""A window on the PyTorch backend: one loop over its micro-batches, one `optimizer.apply`.

The gradients add up where autograd adds them, in `.grad`, with each micro-batch's weight folded into its backward.
Where the variables are narrower than float32, or the losses count different items, `.grad` is drained into sums after
each. This is all that exactness needs; `bigbatch.fused.torch` reaches the same sums with less work.
"""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import torch

from bigbatch.engines.torch_dtypes import gradient_dtype
from bigbatch.keras import batch, losses, noise_window, skipped
from bigbatch.keras.backends.torch.guard import GradientGuard
from bigbatch.keras.guard import guarded

try:
    from bigbatch.fused import torch as fused
except ModuleNotFoundError:  # the folder was left out, and the plain loop does everything
    fused = None


def split_step(model: Any, micro_batch: int) -> Callable[[Any], dict[str, Any]]:
    """`train_step` for a whole batch."""
    known = fused and fused.Known()
    return lambda data: window(model, lambda: add_up(model, cut(data, micro_batch), known))


def cut(data: Any, micro_batch: int) -> list[Any]:
    """A batch's micro-batches, which are views of it."""
    batch.check(data)
    leaves = batch.leaves(data)
    starts = range(0, leaves[0].shape[0], micro_batch)
    return [batch.nest(data, [leaf[i : i + micro_batch] for leaf in leaves]) for i in starts]


def gather(model: Any, window: list[Any]) -> Any:
    """A window's micro-batches as what `stream_step`'s `train_step` takes: as they are."""
    for data in window:
        batch.check(data)
    return window


def stream_step(model: Any) -> Callable[[Any], dict[str, Any]]:
    """`train_step` for a window, as `gather` makes it."""
    known = fused and fused.Known()
    return lambda data: window(model, lambda: add_up(model, data, known))


def window(model: Any, sums: Callable[[], tuple["Sums", list[losses.Term]]]) -> dict[str, Any]:
    """One update from what `add_up` returns. `.grad` is empty afterwards, also after an error."""
    try:
        results = sums()
        with torch.no_grad():
            return _update(model, *results)
    finally:
        model.zero_grad()


def add_up(model: Any, micro_batches: list[Any], known: Any = None) -> tuple["Sums", list[losses.Term]]:
    """Forward and backward of all micro-batches: their sums, and the terms of the last one's loss."""
    parameters = [v.value for v in model.trainable_variables]
    adds_up = len(micro_batches) > 1
    sums = Sums(parameters, len(micro_batches), noise_window.opened(model))
    if fused is not None and adds_up:
        sums.fused = fused.FusedPath(known).window(parameters)
    terms: list[losses.Term] = []
    model.zero_grad()
    with guarded(model, adds_up):
        guard = GradientGuard(parameters, adds_up)
        for data in micro_batches:
            x, y, sample_weight = batch.unpack(data)
            forward = losses.Forward(x, y, batch.call(model, x), sample_weight)
            terms = losses.terms(model, forward)
            with torch.no_grad():
                weights = sums.count(terms, losses.length(x))
            guard.check()
            sums.backward(losses.kinds(terms), weights, model.optimizer, losses.length(x))
            guard.note()
            with torch.no_grad():
                losses.update_metrics(model, forward)
        guard.check()
    return sums, terms


class Sums:
    """A window's sums: the gradients' in `.grad` or in `gradients`, and items and losses, which are kept in lists.

    Args:
        parameters: those that the window trains.
        planned: how many micro-batches the window has.
        noise: the window as the noise scale sees it, or None.

    Attributes:
        fused: the `FusedBackward` that takes the place of autograd's backward, or None.
        gradients: where `.grad` cannot hold them: the parameters' sums, for each kind of items.
    """

    def __init__(self, parameters: list[torch.Tensor], planned: int, noise: noise_window.Window | None) -> None:
        self.parameters, self.planned, self.noise = parameters, planned, noise
        self.measured = noise is not None and noise.measured
        self.fused: Any = None
        self.gradients: list[dict[torch.Tensor, torch.Tensor]] | None = None
        self.noise_parts: Any = None  # the sum of `noise_window.part`
        self.unit: list[torch.Tensor] = []  # what the items of each kind are divided by
        self.items: list[list[torch.Tensor]] = []  # nᵢ for each kind
        self.losses: list[list[tuple[torch.Tensor, torch.Tensor]]] = []  # lossᵢ and nᵢ for each term
        self.examples = self.first = 0  # in all, and in the first micro-batch

    def count(self, terms: list[losses.Term], examples: int) -> list[torch.Tensor]:
        """Adds a micro-batch's losses and items. Returns the weights of its gradients, nᵢ / unit for each kind."""
        items = [n for _, n in losses.kinds(terms)]
        if not self.unit:
            self._open(terms, items, examples)
        for counts, n in zip(self.items, items, strict=True):
            counts.append(n)
        for values, term in zip(self.losses, terms, strict=True):
            values.append((term.value.detach(), term.items))
        self.examples += examples
        return [n / unit for n, unit in zip(items, self.unit, strict=True)]

    def _open(self, terms: list[losses.Term], items: list[torch.Tensor], examples: int) -> None:
        self.items, self.losses, self.first = [[] for _ in items], [[] for _ in terms], examples
        if self.measured or len(items) > 1 or any(gradient_dtype(p).itemsize < 4 for p in self.parameters):
            self.gradients, self.fused = [{} for _ in items], None
        # As in `bigbatch.torch.window`: if all micro-batches are as large as the first, `.grad` ends as the mean.
        planned = self.planned if self.gradients is None else 1
        are_means = losses.are_means(terms)[1]
        self.unit = [torch.where(n > 0, n, 1) * (planned if m else 1) for n, m in zip(items, are_means, strict=True)]

    def backward(self, kinds: list[Any], weights: list[torch.Tensor], optimizer: Any, examples: int) -> None:
        """Adds weight · gradient of each kind's loss."""
        if not self.parameters:
            return
        own: list[dict[torch.Tensor, torch.Tensor]] = [{} for _ in kinds]
        for k, ((value, _), weight) in enumerate(zip(kinds, weights, strict=True)):
            if value.requires_grad:
                scaled = optimizer.scale_loss(value)
                weight = weight.to(scaled.dtype)
                if self.fused is None:
                    scaled.backward(gradient=weight, retain_graph=k + 1 < len(kinds))
                else:
                    self.fused.backward(scaled, weight)
            if self.gradients is not None:
                drain(self.parameters, own[k] if self.measured else self.gradients[k])
        if self.measured:
            self._measure(own, examples)

    @torch.no_grad()
    def _measure(self, own: list[dict[torch.Tensor, torch.Tensor]], examples: int) -> None:
        """Measures one micro-batch's own gradients, and adds them to the sums."""
        part = noise_window.part(self.noise, [[grads.get(p) for p in self.parameters] for grads in own], examples)
        self.noise_parts = part if self.noise_parts is None else self.noise_parts + part
        for totals, grads in zip(self.gradients or [], own, strict=True):
            for p, grad in grads.items():
                totals[p] = totals[p].add_(grad) if p in totals else grad


def drain(parameters: list[torch.Tensor], totals: dict[torch.Tensor, torch.Tensor]) -> None:
    """Moves the gradients from `.grad` to float32 sums."""
    for p in parameters:
        if p.grad is None:
            continue
        grad, p.grad = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32)), None
        totals[p] = totals[p].add_(grad) if p in totals else grad


def _update(model: Any, sums: Sums, terms: list[losses.Term]) -> dict[str, Any]:
    """The mean loss and gradient, for the metrics and the optimizer."""
    terms_are_means, kinds_are_means = losses.are_means(terms)
    means = []
    for parts, is_mean in zip(sums.losses, terms_are_means, strict=True):
        values, items = map(torch.stack, zip(*parts, strict=True))
        total, n = (values * items).sum(), items.sum()
        means.append(total / torch.where(n == 0, 1, n) if is_mean else total)
    loss = losses.report(model, terms, means, sums.examples)
    if not sums.parameters:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return model.get_metrics_result()
    totals = [torch.stack(counts).sum() for counts in sums.items]
    factors = [
        unit / torch.where(n == 0, 1, n) if is_mean else torch.ones_like(unit)
        for unit, n, is_mean in zip(sums.unit, totals, kinds_are_means, strict=True)
    ]
    gradients = _mean_gradients(sums, terms, factors)
    summed = [[total.get(p) for p in sums.parameters] for total in sums.gradients or []]
    noise_logs = noise_window.closed(sums.noise, sums.noise_parts, summed, factors, sums.examples, loss)
    counted = skipped.counted(terms, totals)
    apply(model, gradients, loss, counted)
    return {**model.get_metrics_result(), **noise_logs}


def apply(model: Any, gradients: list[torch.Tensor | None], loss: torch.Tensor, counted: list[torch.Tensor]) -> None:
    """`optimizer.apply`, unless the window is not finite or, by what `skipped.counted` returned, has no items."""
    conditions = [torch.stack(counted).sum() > 0] if counted else []
    if not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):  # which tests finiteness itself
        conditions += _finite(loss, gradients)
    if conditions and not torch.stack(conditions).all():  # here the host waits, once a window
        skipped.report(*[n.item() for n in counted])
    else:
        model.optimizer.apply(gradients, model.trainable_variables)


def _mean_gradients(sums: Sums, terms: list[losses.Term], factors: list[torch.Tensor]) -> list[torch.Tensor | None]:
    if sums.fused is not None:
        sums.fused.flush()
    gradients: list[torch.Tensor | None] = []
    if sums.gradients is None:
        gradients = [p.grad for p in sums.parameters]
        present = [g for g in gradients if g is not None]
        as_planned = sums.examples == sums.first * sums.planned and all(t.kind == losses.EXAMPLES for t in terms)
        if present and not as_planned:
            # In torch's public list of foreach functions, underscore and all.
            torch._foreach_mul_(present, factors[0])  # pyright: ignore[reportPrivateImportUsage]
        return gradients
    for p in sums.parameters:
        parts = [t[p] * f.to(t[p].dtype) for t, f in zip(sums.gradients, factors, strict=True) if p in t]
        gradients.append(sum(parts[1:], parts[0]).to(gradient_dtype(p)) if parts else None)
    return gradients


def _finite(loss: torch.Tensor, gradients: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Whether the loss and all gradients are finite, on the device; nothing where there are no gradients."""
    norms = torch._foreach_norm([g for g in gradients if g is not None])  # pyright: ignore[reportPrivateImportUsage]
    return [torch.stack([loss.to(norms[0].dtype), *norms]).isfinite().all()] if norms else []
