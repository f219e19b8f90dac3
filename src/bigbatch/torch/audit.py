"""`audit`: is accumulation exact for this model, this loss and this batch?

`bigbatch.audit_experiments` has the experiments. Here is how PyTorch makes runs after which the model is as before.
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bigbatch import errors
from bigbatch.audit import Audit
from bigbatch.audit_experiments import examine
from bigbatch.audit_probe import Examples, Run
from bigbatch.engines import randomness, torch_rng
from bigbatch.engines.activations import ActivationDiff
from bigbatch.engines.torch_dtypes import exact
from bigbatch.torch.batch import children_of, leaves, mapped
from bigbatch.torch.checks import check_items, check_loss
from bigbatch.torch.chunked_call import repetitions_checked


def audit(
    loss_fn: Callable[[Any], Tensor | tuple[Tensor, float | Tensor]],
    model: nn.Module | Iterable[Tensor],
    batch: Any,
    *,
    micro_batch: int,
    cut: Callable[[Any, Tensor], Any] | None = None,
    length: int | None = None,
) -> Audit:
    """Says whether `bb.backward(loss_fn, batch, micro_batch=…)` gives the batch's own gradient, and if not, why.

    It compares the two, in float64 where the model can, and finds the cause by experiment::

        print(bb.audit(loss_fn, model, (x, y), micro_batch=8))
        # not exact: 4 of 6 parameters differ, the largest by 25%
        # - module (1): An example's output of 1 depends on the other examples that it is computed with: …

    The answer is about this batch. Give it one like those you train on: ragged where they are, with masks that differ.
    Some dozens of examples are enough; the whole batch must fit in memory, and 10 to 50 passes over it are made.

    Args:
        loss_fn: as for `bb.backward`: takes a micro-batch and returns its mean loss, or `(loss, items)`.
        model: the module that `loss_fn` uses, or the tensors to compare the gradients of.
        batch: as for `bb.backward`.
        micro_batch: examples in a micro-batch; fewer than the batch holds.
        cut: as for `bb.backward`. Without it the answer names rows that belong together.
        length: as for `bb.backward`, with `cut`.

    Returns:
        An `Audit`: `verdict`, `exact`, `causes`, `parameters`, `table()` and `figure(path)`.

    Raises:
        TypeError, ValueError: an argument, a loss or its items are not as described.
        RuntimeError: a piece of a `chunked` function gives something else when it runs again.

    The model, its buffers and modes, `.grad` and the random state (PyTorch's, NumPy's and Python's) are put back as
    they were; no optimizer is touched. Hooks on parameters do not fire. Only what a forward writes into objects of its
    own, such as a list, stays.
    """
    micro_batch = errors.check_micro_batch(micro_batch, auto=False)
    errors.check_cut(cut, length)
    if length is None:
        length = errors.check_lengths([(where, len(leaf)) for where, leaf in leaves(batch, "batch")])
    if micro_batch >= length:
        raise errors.one_micro_batch(micro_batch, length)
    parameters = _parameters(model)
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    own = {p.dtype for p in parameters.values()}
    wide = {exact(p.device) for p in parameters.values()}  # Apple's devices have no float64
    subject = Subject(loss_fn, modules, parameters, batch, length, micro_batch, cut)
    with _preserved(parameters.values()), repetitions_checked():
        for dtype in (torch.float64, torch.float32):
            if dtype == torch.float32 or wide == {torch.float64}:
                runner = AuditRunner(subject, dtype)
                if own == {dtype} or runner.runs():
                    return examine(runner)
        return examine(AuditRunner(subject, None))


class Subject(NamedTuple):
    """What is audited."""

    loss_fn: Callable[[Any], Any]
    modules: dict[str, nn.Module]
    parameters: dict[str, Tensor]
    batch: Any
    length: int
    micro_batch: int
    cut: Callable[[Any, Tensor], Any] | None


class AuditRunner:
    """Runs of one loss function on one batch (see `audit_experiments`), in one dtype; None is the model's own."""

    def __init__(self, subject: Subject, dtype: torch.dtype | None):
        self.loss_fn, modules, parameters, batch, self.length, self.micro_batch, self.cut = subject
        self.modules, self.parameters = modules, parameters
        narrowest = min((p.dtype for p in parameters.values()), key=lambda d: d.itemsize)
        self.dtype = str(dtype or narrowest).removeprefix("torch.")

        def cast(leaf: Any) -> Any:
            floating = dtype is not None and isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.to(dtype) if floating else leaf

        self.batch = mapped(batch, cast)
        self.state = [
            (m, dict(vars(m)), dict(m.named_buffers(recurse=False, remove_duplicate=False))) for m in modules.values()
        ]
        tensors = [t for m in modules.values() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
        tensors = {id(t): t for t in (*tensors, *parameters.values())}.values()
        self.values = [(t, t.data, cast(t.data)) for t in tensors]

    def runs(self) -> bool:
        """Whether the model can compute in this dtype."""
        try:
            self.gradient([range(self.micro_batch)], seed=0, quiet=frozenset())
        except (RuntimeError, TypeError, NotImplementedError):
            return False
        return True

    def gradient(
        self,
        parts: Sequence[Examples],
        *,
        seed: int,
        quiet: frozenset[str],
        fresh: bool = False,
        items: Any = None,
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Σ nᵢ·gᵢ / Σ nᵢ over the parts; a parameter without a gradient has one of zero."""
        sums = {name: torch.zeros_like(p.data, dtype=exact(p.device)) for name, p in self.parameters.items()}
        count = 0.0
        with self.at_rest(seed, quiet) as reset:
            for i, rows in enumerate(parts):
                if fresh:
                    reset()
                loss, n = self.forward(rows)
                n = n if items is None else items[i]
                count += n
                gradients = torch.autograd.grad(scale * loss, list(self.parameters.values()), allow_unused=True)
                for name, grad in zip(self.parameters, gradients, strict=True):
                    if grad is not None and n:
                        sums[name] += n * grad.to_dense().to(sums[name].dtype)
        return {name: total / (count * scale) for name, total in sums.items()}

    def loss(self, rows: Examples, *, seed: int, quiet: frozenset[str]) -> Run:
        """One forward pass over these rows."""
        with self.at_rest(seed, quiet), torch.no_grad():
            loss, items = self.forward(rows)
            return Run(float(loss), items)

    def forward(self, rows: Examples) -> tuple[Tensor, float]:
        """The mean loss of these rows, and its items."""
        index = torch.tensor(list(rows))

        def chosen(leaf: Any) -> Any:
            return leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) else [leaf[i] for i in rows]

        part = mapped(self.batch, chosen) if self.cut is None else self.cut(self.batch, index)
        loss, items = errors.loss_and_items(self.loss_fn(part))
        if torch.is_grad_enabled():
            loss = check_loss(loss)
        return loss, float(check_items(len(rows) if items is None else items))

    def sources(self, rows: Examples, seed: int, quiet: frozenset[str]) -> list[str]:
        """The modules whose outputs for the first rows are not those in the whole batch, though their inputs are."""
        allowed = 1e-4 if self.dtype in ("float64", "float32") else 5e-2  # parts may be computed in less
        diff = ActivationDiff(len(rows) == self.length, allowed)

        def record(name: str, inputs: Any, output: Any) -> None:
            diff.record(name, *([_array(t) for t in _tensors(nest)] for nest in (inputs, output)))

        def compare(name: str, inputs: Any, output: Any) -> None:
            outputs = _tensors(output)
            parts = diff.compare(name, [_array(t) for t in _tensors(inputs)], [_array(t) for t in outputs])
            for now, part in zip(outputs, parts, strict=False):
                if part is not None:
                    now.copy_(torch.from_numpy(part))

        for run, chosen, with_seed in ((record, range(self.length), 0), (compare, rows, seed)):
            with self.at_rest(with_seed, quiet), torch.no_grad(), _traced(self.modules, run):
                self.forward(chosen)
        return list(dict.fromkeys(diff.differing))

    @contextlib.contextmanager
    def at_rest(self, seed: int, quiet: frozenset[str]) -> Iterator[Callable[[], None]]:
        """The model in this dtype, with seeded random generators. Yields what restores the model to that."""

        def reset() -> None:
            self.put_back()
            for tensor, _, value in self.values:
                tensor.data = value.clone()
            for name in quiet:
                self.modules[name].training = False

        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            with torch.enable_grad():
                reset()
                yield reset
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Everything that a forward may have changed."""
        for module, attributes, buffers in self.state:
            vars(module).clear()
            vars(module).update(attributes)
            for name, buffer in buffers.items():
                setattr(module, name, buffer)
        for tensor, value, _ in self.values:
            tensor.data = value


def _parameters(model: Any) -> dict[str, Tensor]:
    """What to compare the gradients of, by name."""
    if isinstance(model, nn.Module):
        named: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    else:
        given: list[Any] = (
            [model] if isinstance(model, Tensor) else list(model) if isinstance(model, Iterable) else [None]
        )
        if any(not isinstance(p, Tensor) for p in given):
            raise TypeError(
                f"model must be a torch.nn.Module or tensors. {errors.received('model', model)} "
                "Pass the module that loss_fn uses, or the parameters to audit."
            )
        named = {f"parameters[{i}]": p for i, p in enumerate(given) if p.requires_grad}
    if not named:
        raise ValueError(
            f"No parameter requires a gradient. {errors.received('model', type(model).__name__)} "
            "Pass a module or tensors with requires_grad=True."
        )
    return named


@contextlib.contextmanager
def _preserved(parameters: Iterable[Any]) -> Iterator[None]:
    """Afterwards the random state and the gradients are as they were. Inside, hooks on parameters are not called."""
    parameters = list(parameters)
    # `torch.autograd.grad` calls the hooks of `Tensor.register_hook`, and no public name removes and restores them:
    # tests/torch/test_private.py.
    before = [(p, p.grad, p._backward_hooks) for p in parameters]
    try:
        for p in parameters:
            p.grad = p._backward_hooks = None
        with torch_rng.kept(parameters), randomness.preserved():
            yield
    finally:
        for p, gradient, hooks in before:
            p.grad, p._backward_hooks = gradient, hooks


@contextlib.contextmanager
def _traced(modules: dict[str, nn.Module], run: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Calls `run(name, inputs, output)` after each module's forward."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs, output: run(name, (args, kwargs), output)

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(nest: Any) -> list[Tensor]:
    """The tensors of any nesting that a batch may have; what else is in it is passed over."""
    if isinstance(nest, Tensor):
        return [nest]
    return [t for _, _, child in children_of(nest) or () for t in _tensors(child)]


def _array(tensor: Tensor) -> np.ndarray:
    """A copy of its values; NumPy has no bfloat16."""
    values = tensor.detach().to("cpu", copy=True)
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()
