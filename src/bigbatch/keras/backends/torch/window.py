"""A window on the PyTorch backend: one loop over its micro-batches, one `optimizer.apply`.

The gradients add up where autograd puts them, in `.grad`, with each micro-batch's weight folded into its backward.
Those of dense layers' weights and of tables are added there by `bigbatch.fused.torch_graph`, without a temporary.
Where the variables are narrower than float32, or the losses count different items, all are taken out after each.
"""

import warnings
from collections.abc import Callable
from typing import Any

import keras
import torch

from bigbatch.fused import torch_graph
from bigbatch.fused.torch_deferred import Products
from bigbatch.fused.torch_proof import Known, Proof
from bigbatch.keras import batch, losses, noise, skips
from bigbatch.keras.alone import Gradients, alone


def split_step(model: Any, micro_batch: int) -> Callable[[Any], dict[str, Any]]:
    """`train_step` for a whole batch."""
    known = Known()
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
    known = Known()
    return lambda data: window(model, lambda: add_up(model, data, known))


class _Sums:
    """What a window's micro-batches left: nᵢ for each kind of items; lossᵢ and nᵢ for each term of the loss.

    These numbers wait in lists, and are added up once, at the window's end.
    """

    def __init__(self, noisy: noise.Window | None, planned: int) -> None:
        self.noisy = noisy
        self.planned = planned  # micro-batches
        self.parts: Any = None  # the sum of `noise.part`
        self.unit: list[torch.Tensor] = []
        self.items: list[list[torch.Tensor]] = []
        self.losses: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self.examples = self.first = 0  # in all, and in the first
        # None where all gradients are to be autograd's.
        self.products: Products | None = None
        self.proof: Proof | None = None
        # Where `.grad` cannot hold them: for each kind, the variables' sums.
        self.gradients: list[dict[torch.Tensor, torch.Tensor]] | None = None

    def measure(
        self, parameters: list[torch.Tensor], own: list[dict[torch.Tensor, torch.Tensor]], examples: int
    ) -> None:
        """Takes in one micro-batch's own gradients."""
        with torch.no_grad():
            found = [[grads.get(p) for p in parameters] for grads in own]
            part = noise.part(self.noisy, found, examples)
            self.parts = part if self.parts is None else self.parts + part
            for totals, grads in zip(self.gradients or [], own, strict=True):
                for p, grad in grads.items():
                    totals[p] = totals[p].add_(grad) if p in totals else grad


def window(model: Any, added: Callable[[], tuple[_Sums, list[losses.Term]]]) -> dict[str, Any]:
    """One update from what `add_up` found. `.grad` is free again afterwards, whatever happened."""
    try:
        found = added()
        with torch.no_grad():
            return _update(model, *found)
    finally:
        model.zero_grad()


def add_up(model: Any, micro_batches: list[Any], known: Known | None = None) -> tuple[_Sums, list[losses.Term]]:
    """Forward and backward of all micro-batches. The gradients are in `.grad`, or in the sums."""
    parameters = [v.value for v in model.trainable_variables]
    sums = _Sums(noise.opened(model), len(micro_batches))
    weights = torch_graph.may_take(parameters)
    if weights and len(micro_batches) > 1 and torch_graph.is_alone():  # one adds nothing up
        sums.products, sums.proof = Products(weights), Proof(known, started=True)
    described: list[losses.Term] = []
    model.zero_grad()
    several = len(micro_batches) > 1
    with alone(model, several):
        gradients = Gradients(parameters, several)
        for data in micro_batches:
            described = _take(model, data, gradients, sums)
        gradients.check()
    return sums, described


def _take(model: Any, data: Any, gradients: Gradients, sums: _Sums) -> list[losses.Term]:
    parameters = gradients.parameters
    x, y, sample_weight = batch.unpack(data)
    y_pred = model(x, training=True) if model._call_has_training_arg else model(x)
    terms = losses.terms(model, x, y, y_pred, sample_weight)
    kinds = losses.kinds(terms)
    measured = sums.noisy is not None and sums.noisy.measured
    with torch.no_grad():
        items = [count for _, count in kinds]
        if not sums.unit:
            sums.items, sums.losses = [[] for _ in kinds], [[] for _ in terms]
            if measured or len(kinds) > 1 or any(torch_graph.gradient_dtype(p).itemsize < 4 for p in parameters):
                sums.gradients, sums.products = [{} for _ in kinds], None
            # As in `bigbatch.torch.window`: where the plan comes true, what `.grad` holds at the end are the means.
            planned = sums.planned if sums.gradients is None else 1
            divided = losses.quotients(terms)[1]
            sums.unit = [torch.where(n > 0, n, 1) * (planned if d else 1) for n, d in zip(items, divided, strict=True)]
            sums.first = losses.length(x)
        weights = [n / unit for n, unit in zip(items, sums.unit, strict=True)]
        for found, n in zip(sums.items, items, strict=True):
            found.append(n)
        for found, term in zip(sums.losses, terms, strict=True):
            found.append((term.value.detach(), term.items))
        sums.examples += losses.length(x)
    gradients.check()
    if parameters:
        own: list[dict[torch.Tensor, torch.Tensor]] = [{} for _ in kinds]
        for k, ((value, _), weight) in enumerate(zip(kinds, weights, strict=True)):
            if value.requires_grad:
                scaled = model.optimizer.scale_loss(value)
                weight = weight.to(scaled.dtype)
                if sums.products is None:
                    scaled.backward(gradient=weight, retain_graph=k + 1 < len(kinds))
                else:
                    graph = torch_graph.read(scaled, sums.proof)
                    torch_graph.differentiate(scaled, weight, graph, sums.products)
                    if len(sums.losses[0]) == 1 and not graph.has_products:
                        sums.products = None  # the next micro-batches' are hardly others
            if sums.gradients is not None:
                _move(parameters, own[k] if measured else sums.gradients[k])
        if measured:
            sums.measure(parameters, own, losses.length(x))
    gradients.note()
    with torch.no_grad():
        losses.update_metrics(model, x, y, y_pred, sample_weight)
    return terms


def _move(parameters: list[torch.Tensor], totals: dict[torch.Tensor, torch.Tensor]) -> None:
    """Takes the gradients out of `.grad` into float32 sums."""
    for p in parameters:
        if p.grad is None:
            continue
        grad, p.grad = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32)), None
        totals[p] = totals[p].add_(grad) if p in totals else grad


def _update(model: Any, sums: _Sums, described: list[losses.Term]) -> dict[str, Any]:
    variables = model.trainable_variables
    parameters = [v.value for v in variables]
    terms_divide, kinds_divide = losses.quotients(described)
    means = []
    for found, divide in zip(sums.losses, terms_divide, strict=True):
        values, items = map(torch.stack, zip(*found, strict=True))
        total, n = (values * items).sum(), items.sum()
        means.append(total / torch.where(n == 0, 1, n) if divide else total)
    total = losses.report(model, described, means, sums.examples)
    if not parameters:
        warnings.warn("The model does not have any trainable weights.", stacklevel=2)
        return model.get_metrics_result()
    totals = [torch.stack(found).sum() for found in sums.items]
    factors = [
        u / torch.where(n == 0, 1, n) if divide else torch.ones_like(u)
        for u, n, divide in zip(sums.unit, totals, kinds_divide, strict=True)
    ]
    if sums.products is not None:
        sums.products.settle()
    if sums.gradients is None:
        gradients = [p.grad for p in parameters]
        present = [g for g in gradients if g is not None]
        planned = sums.examples == sums.first * sums.planned and all(t.kind == losses.EXAMPLES for t in described)
        if present and not planned:
            # In torch's public list of foreach functions, underscore and all.
            torch._foreach_mul_(present, factors[0])  # pyright: ignore[reportPrivateImportUsage]
    else:
        gradients = []
        for p in parameters:
            parts = [t[p] * f.to(t[p].dtype) for t, f in zip(sums.gradients, factors, strict=True) if p in t]
            gradients.append(sum(parts[1:], parts[0]).to(torch_graph.gradient_dtype(p)) if parts else None)
    summed = [[totals.get(p) for p in parameters] for totals in sums.gradients or []]
    noise_logs = noise.closed(sums.noisy, sums.parts, summed, factors, sums.examples, total)
    scaling = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)  # which asks for itself
    counted = skips.counted(described, totals)
    good = [torch.stack(counted).sum() > 0] if counted else []
    if not scaling:
        good += _finite(total, gradients)
    if good and not torch.stack(good).all():  # here the host waits, once a window
        skips.say(*[n.item() for n in counted])
    else:
        model.optimizer.apply(gradients, variables)
    return {**model.get_metrics_result(), **noise_logs}


def _finite(total: torch.Tensor, gradients: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """Whether the loss and all gradients are finite, on the device; nothing where there are no gradients."""
    norms = torch._foreach_norm([g for g in gradients if g is not None])  # pyright: ignore[reportPrivateImportUsage]
    return [torch.stack([total.to(norms[0].dtype), *norms]).isfinite().all()] if norms else []
