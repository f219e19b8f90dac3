"""`audit`: is accumulation exact for this loss and this batch?

`bigbatch.audit_experiments` has the experiments. A loss function in JAX is a pure function of its arguments, so that
a run leaves nothing behind, and there are no modules to watch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch import errors
from bigbatch.audit import Audit
from bigbatch.audit_experiments import examine
from bigbatch.audit_probe import Examples, Run
from bigbatch.jax.batch import Batch, check_in_axes
from bigbatch.jax.window import Options


def audit(
    loss_fn: Callable[..., Any],
    *args: Any,
    micro_batch: int,
    argnums: int = 0,
    in_axes: Sequence[Any] = (None, 0),
    has_aux: bool = False,
    has_items: bool = False,
) -> Audit:
    """Says whether `bb.value_and_grad(loss_fn, micro_batch=…)(*args)` is the batch's own gradient, and if not, why.

    It compares the two, in float64 where the loss function can, and finds the cause by experiment::

        print(bb.audit(loss_fn, params, batch, micro_batch=8))
        # not exact: 2 of 4 parameters differ, the largest by 25%
        # - coupling: The loss couples examples: …

    The answer is about this batch. Give it one like those you train on: ragged where they are, with masks that differ.
    Some dozens of examples are enough; the whole batch must fit in memory, and 10 to 50 passes over it are made, with a
    compilation for each of about ten sizes. Not to be called under `jit`.

    Args:
        loss_fn: as for `bb.value_and_grad`: returns the mean loss, `(loss, items)` with `has_items`, or several terms
            by name.
        args: its positional arguments.
        micro_batch: examples in a micro-batch; fewer than the batch holds.
        argnums: the argument to differentiate.
        in_axes: as for `bb.value_and_grad`.
        has_aux: whether `loss_fn` returns `(loss, aux)`; the second part is not looked at.
        has_items: whether `loss_fn` returns `(loss, items)`; with `has_aux` too, `((loss, items), aux)`.

    Returns:
        An `Audit`: `verdict`, `exact`, `causes`, `parameters`, `table()` and `figure(path)`.

    Raises:
        TypeError, ValueError: an argument, a loss or its items are not as described.
    """
    micro_batch = errors.check_micro_batch(micro_batch, auto=False)
    check_in_axes(in_axes)
    length = Batch(loss_fn, args, {}, in_axes, micro_batch).length
    if micro_batch >= length:
        raise errors.one_micro_batch(micro_batch, length)
    options = Options(loss_fn, argnums, has_aux, has_items, in_axes, aux=None, dtype=None, names=())
    with jax.enable_x64(True):
        runner = AuditRunner(options, args, micro_batch, "float64")
        if runner.runs():
            return examine(runner)
    return examine(AuditRunner(options, args, micro_batch, None))


class AuditRunner:
    """Runs of one loss function on one batch (see `audit_experiments`); without a dtype, in the arguments' own."""

    def __init__(self, options: Options, args: tuple[Any, ...], micro_batch: int, dtype: str | None):
        def cast(x: Any) -> Any:
            if dtype is None or not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return jnp.asarray(x, dtype)

        batch = options.batch(jax.tree.map(cast, args), {}, micro_batch)
        batch.check_parameters(options.numbers)
        # On the host, where slices of different lengths need no compiled program each.
        self.leaves = [
            leaf if leaf.axis is None or _is_key(leaf.value) else leaf._replace(value=np.asarray(leaf.value))
            for leaf in batch.leaves
        ]
        self.tree = batch.tree
        self.length, self.micro_batch = batch.length, micro_batch
        paths = jax.tree_util.tree_leaves_with_path(options.parameters(args))
        self.names = [jax.tree_util.keystr(path) or f"args[{options.argnums}]" for path, _ in paths]
        self.dtype = dtype or min((str(leaf.dtype) for _, leaf in paths), key=lambda name: jnp.dtype(name).itemsize)

        def losses(args: Any, examples: int) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            terms, _ = options.run(args, {}, examples)
            return (terms.losses, terms.items) if terms.named else ({"": terms.losses}, {"": terms.items})

        def gradients(args: Any, examples: int, scale: Any) -> Any:
            def scaled(*args: Any) -> Any:
                values, items = losses(args, examples)
                return jax.tree.map(lambda loss: loss * jnp.asarray(scale, loss.dtype), values), items

            return jax.jacrev(scaled, options.argnums, has_aux=True)(*args)

        self._losses = jax.jit(losses, static_argnums=1)
        self._gradients = jax.jit(gradients, static_argnums=1)

    def runs(self) -> bool:
        """Whether the loss function can compute in this dtype."""
        try:
            self._gradients(self.arguments(range(self.micro_batch), 0, 0), self.micro_batch, 1.0)
        except (TypeError, ValueError):
            return False
        return True

    def arguments(self, rows: Examples, seed: int, part: int) -> Any:
        """The arguments for these rows. PRNG keys given whole are folded, as `bb.value_and_grad` does."""
        index = np.asarray(list(rows))

        def leaf(one: Any) -> Any:
            if one.axis is not None:
                return one.value[(slice(None),) * one.axis + (index,)]
            if _is_key(one.value):
                fold = jax.vmap(jax.random.fold_in, (0, None))
                return fold(one.value.reshape(-1), 1_000_000 * seed + part).reshape(one.value.shape)
            return one.value

        args, _ = self.tree.unflatten(map(leaf, self.leaves))
        return args

    def gradient(
        self,
        parts: Sequence[Examples],
        *,
        seed: int,
        quiet: frozenset[str],
        fresh: bool = False,
        items: Any = None,
        scale: float = 1.0,
    ) -> dict[str, np.ndarray]:
        """Each term's Σ nᵢ·gᵢ / Σ nᵢ over the parts, added up."""
        sums: dict[str, list[np.ndarray]] = {}
        counts: dict[str, float] = {}
        for k, rows in enumerate(parts):
            jacobian, counted = self._gradients(self.arguments(rows, seed, k), len(rows), scale)
            for name, tree in jacobian.items():
                n = float(counted[name]) if items is None else items[k]
                grads = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
                before = sums.get(name, [0.0] * len(grads))
                sums[name] = [s + n * g if n else s + 0 * np.zeros_like(g) for s, g in zip(before, grads, strict=True)]
                counts[name] = counts.get(name, 0.0) + n
        means = [[g / (counts[name] * scale) for g in grads] for name, grads in sums.items()]
        return {name: np.asarray(sum(g)) for name, *g in zip(self.names, *means, strict=True)}

    def loss(self, rows: Examples, *, seed: int, quiet: frozenset[str]) -> Run:
        """One forward pass over these rows; of several terms, their sum and the first one's items."""
        losses, items = self._losses(self.arguments(rows, seed, 0), len(rows))
        return Run(sum(map(float, losses.values())), float(next(iter(items.values()))))

    def sources(self, rows: Examples, seed: int, quiet: frozenset[str]) -> list[str]:
        """A function has no modules."""
        return []


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
