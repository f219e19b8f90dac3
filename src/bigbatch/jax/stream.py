"""The stream door: your loader yields micro-batches, and bigbatch stands where optax applies a gradient."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bigbatch import errors
from bigbatch.every import Every, Items, as_every
from bigbatch.jax import noise as noisy
from bigbatch.jax.window import as_items, widened
from bigbatch.noise import UntilNoise, one_in

# What `Update.skipped` stands for. A pytree holds numbers; `Update.reason` puts the words to them.
APPLIED, EMPTY, NO_ITEMS, NOT_FINITE, CARRIED, DROPPED = range(6)


class Update(NamedTuple):
    """What the last window came to: scalar arrays, so that it travels through `jit` and into checkpoints."""

    micro_batches: jax.Array  # how many the window held, int32
    items: jax.Array  # the examples or tokens that they counted for
    loss: jax.Array  # the window's mean of `value` over items; NaN where none was given
    grad_norm: jax.Array  # the 2-norm of the window's mean gradient, before the inner transformation
    skipped: jax.Array  # 0 where the update was made, int32
    noise: Any = None  # what the window says of the gradient's noise, a WindowNoise, where `noise` is measured

    @property
    def reason(self) -> str | None:
        """Why no update was made, or None where it was. The host waits for the device."""
        return {
            APPLIED: None,
            EMPTY: "the window held no micro-batches",
            NO_ITEMS: "the window holds no items",
            NOT_FINITE: f"the window is not finite: loss {self.loss}, gradient norm {self.grad_norm}",
            CARRIED: f"carried: {self.micro_batches} micro-batches of a partial window wait for more",
            DROPPED: f"dropped: {self.micro_batches} micro-batches of a partial window",
        }[int(self.skipped)]


class AccumulateState(NamedTuple):
    """The state of `accumulate`: the open window's sums, the inner state, and what the last window came to."""

    updates: jax.Array  # made so far, and so the index of the next, int32
    micro_batches: jax.Array  # in the open window, int32
    items: jax.Array  # Σ nᵢ
    unit: jax.Array  # the first micro-batch's items; weights are nᵢ / unit, so equal ones are exactly 1
    loss: jax.Array  # Σ nᵢ·lossᵢ / unit
    grads: Any  # Σ nᵢ·gᵢ / unit, at least float32; whatever the window before left there at micro_batches 0
    inner: Any
    last: Update
    noise: Any = None  # a NoiseState, where noise is measured


def accumulate(
    tx: optax.GradientTransformation,
    every: Every | UntilNoise,
    *,
    dtype: Any = jnp.float32,
    partial: Literal["apply", "carry", "drop"] = "apply",
    noise: bool | int = False,
) -> optax.GradientTransformationExtraArgs:
    """Makes one update of `tx` from the gradients of many micro-batches.

    It is an optax transformation like `tx` itself, and takes its place::

        tx = bb.accumulate(optax.adamw(1e-3), every=64)
        opt_state = tx.init(params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, opt_state, x, y):
            loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
            return bb.apply_gradients(tx, grads, opt_state, params, items=len(x), value=loss)

    `bb.apply_gradients` is `tx.update` and `optax.apply_updates` (which do as well) in one. Inside a window updates are
    zeros and `tx` does not run: its step count, schedule, decay and clipping happen once a window, on the mean over all
    items. A window whose mean gradient is inf or NaN makes no update and leaves nothing behind. `update` takes, beside
    optax's own arguments:

    * `items`, required: what the gradient's loss is the mean of, a number of examples or tokens above zero, or a
      scalar array (`mask.sum()`), whose value cannot be checked while tracing; 0 in it counts for nothing.
    * `value`: the micro-batch's mean loss. `tx` is given the window's mean of it as its `value`.
    * any other extra argument, which reaches `tx` as given with the window's last micro-batch.

    What stands outside `accumulate`, such as a `chain` or `inject_hyperparams` around it, sees every micro-batch.

    Args:
        tx: any optax gradient transformation, usually the whole optimizer.
        every: when a window closes. A number of micro-batches; a traceable callable that takes the update's index
            and returns one (batch-size warm-up); `bb.items(4096)`; or `bb.until_noise(at_most=256)`.
        dtype: the narrowest dtype to accumulate in. Gradients of bfloat16 and float16 parameters add up in float32
            and are rounded once, for `tx`. None adds up in the parameters' own dtype.
        partial: what `flush` does with a window that is not full: "apply" makes the update from what is there,
            "carry" keeps it open, "drop" forgets it.
        noise: measures the gradient noise scale, for `bb.noise_scale(state)` and the `noise` of an Update. True
            measures one window in twenty, an integer n one in n; `until_noise` measures every window.

    Returns:
        A transformation whose state is an `AccumulateState`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx must be an optax.GradientTransformation. {errors.received('tx', tx)} "
            "Pass the transformation itself, such as optax.adamw(1e-3)."
        )
    tx = optax.with_extra_args_support(tx)
    every = every if isinstance(every, UntilNoise) else as_every(every)
    measured = 1 if isinstance(every, UntilNoise) else one_in(noise)
    errors.check_choice("partial", partial, ("apply", "carry", "drop"))

    def init(params: optax.Params) -> AccumulateState:
        sums = jax.tree.map(lambda p: jnp.zeros_like(p, widened(p.dtype, dtype)), params)
        empty = _emptied(sums, jnp.zeros((), jnp.int32), tx.init(params), _update(EMPTY))
        return _with_noise(empty, noisy.start()) if measured else empty

    def measures(state: AccumulateState) -> Any:
        return True if measured == 1 else state.updates % measured == 0

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        items: Any = None,
        value: Any = None,
        flush: bool = False,
        and_apply: bool = False,  # for `apply_gradients`: the parameters come back in place of updates
        **extra: Any,
    ) -> tuple[Any, AccumulateState]:
        grads = updates
        if flush:
            extra["value"] = state.loss * state.unit / state.items
            full = (state.micro_batches > 0) & (partial == "apply")
        else:
            items = as_items(items)
            if state.noise is not None:
                first = state.micro_batches == 0
                taken = noisy.taken(state.noise, grads, items, first, measures(state))
                state = state._replace(noise=taken)
            state = _add(state, grads, items, value)
            if value is not None:
                extra["value"] = state.loss * state.unit / state.items
            full = _is_full(every, state)

        def apply(state: AccumulateState, params: Any) -> Any:
            # In a window of one it is exactly 1; saying so spares the rounding of a product fused into tx.
            factor = 1.0 if full is True else state.unit / state.items
            mean = jax.tree.map(lambda s, g: (s * jnp.asarray(factor, s.dtype)).astype(g.dtype), state.grads, grads)
            return tx.update(mean, state.inner, params, items=state.items, **extra)

        like = None if and_apply else jax.eval_shape(apply, state, params)[0]
        lent = not and_apply and _fits(like, state.grads)

        def made(state: AccumulateState, params: Any) -> tuple[Any, Any, Any, jax.Array]:
            updates, inner = apply(state, params)
            held = jax.tree.map(lambda u, s: u.astype(s.dtype), updates, state.grads) if lent else state.grads
            if and_apply:
                updates = optax.apply_updates(params, updates)
            return None if lent else updates, held, inner, state.updates + 1

        def skip(state: AccumulateState, params: Any) -> tuple[Any, Any, Any, jax.Array]:
            return unmoved(params), state.grads, state.inner, state.updates

        def close(state: AccumulateState, params: Any) -> tuple[Any, AccumulateState]:
            wide = jax.tree.map(lambda s: s.astype(widened(s.dtype, jnp.float32)), state.grads)
            norm = optax.tree.norm(wide) * (state.unit / state.items)
            finite, some = jnp.isfinite(norm), state.items > 0
            skipped = jnp.where(some, jnp.where(finite, APPLIED, NOT_FINITE), NO_ITEMS)
            applied, held, inner, count = lax.cond(finite & some, made, skip, state, params)
            empty = _emptied(held, count, inner, _update(skipped, state, norm))
            if state.noise is None:
                return applied, empty
            noise, window = noisy.closed(state.noise, state.items, norm, measures(state), finite & some)
            return applied, _with_noise(empty, noise, window)

        def stay(state: AccumulateState, params: Any) -> tuple[Any, AccumulateState]:
            if not flush:
                return unmoved(params), state
            if partial == "carry":
                held = state._replace(last=_update(_if_any(state, CARRIED), state))
                return unmoved(params), _with_noise(held, state.noise)
            last = _update(_if_any(state, DROPPED), state)
            return unmoved(params), _with_noise(_emptied(state.grads, state.updates, state.inner, last), state.noise)

        def unmoved(params: Any) -> Any:
            return params if and_apply else None if lent else optax.tree.zeros_like(like)

        # Windows of one need no branch.
        both = state, params
        updates, state = close(*both) if full is True else lax.cond(full, close, stay, *both)
        if lent:
            updates = jax.tree.map(lambda u, s: jnp.where(has_updated(state), s.astype(u.dtype), 0), like, state.grads)
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


def flush(
    tx: optax.GradientTransformationExtraArgs, state: optax.OptState, params: optax.Params, **extra: Any
) -> tuple[optax.Updates, Any]:
    """Ends a window that is not full, as `partial` says: at the end of an epoch, or of the data.

    To be called like `tx.update`, under `jit` too; `state.last` then says what was done.

    Args:
        tx: `accumulate(…)`, or an optax transformation with one or several inside, such as a `chain`.
        state: its state.
        params: the parameters.
        **extra: further arguments for the inner transformation.

    Returns:
        `(updates, state)`; the updates are zeros where none was made.
    """
    return tx.update(optax.tree.zeros_like(params), state, params, flush=True, **extra)


def reset(state: AccumulateState) -> AccumulateState:
    """The same state with an empty window."""
    empty = _emptied(optax.tree.zeros_like(state.grads), state.updates, state.inner, state.last)
    return empty._replace(noise=state.noise)


def has_updated(state: AccumulateState) -> jax.Array:
    """Whether the last call made an update: a boolean scalar, to be branched on inside `jit`.

    Inside a `chain`, find the state with `optax.tree.get(opt_state, "AccumulateState")`.
    """
    return (state.micro_batches == 0) & (state.last.skipped == APPLIED)


def apply_gradients(
    tx: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: AccumulateState,
    params: optax.Params,
    **extra: Any,
) -> tuple[optax.Params, AccumulateState]:
    """`tx.update` and `optax.apply_updates` in one: the faster way where the two stand together.

    Inside a window the updates are zeros. Here they are not made, and the parameters are left alone; there it would
    be two passes over the parameters for each micro-batch. All is in one branch: at each, a GPU's host waits for the
    condition. Under `jit`, donate the parameters and the state: they then stay where they are.

    Args:
        tx: `accumulate(…)` itself. With something around that (a `chain`, a `partition`), which may make updates inside
            a window too, call `tx.update` and `optax.apply_updates`.
        grads: the micro-batch's mean gradient.
        state: the state of `tx`.
        params: the parameters.
        **extra: what `tx.update` takes: `items`, `value`, …

    Returns:
        `(params, state)`, the parameters in their own dtypes.

    Raises:
        TypeError, ValueError: `state` is not the state of `accumulate`, or an argument is not as `tx.update` takes it.
    """
    if not isinstance(state, AccumulateState):
        raise TypeError(
            f"state must be the AccumulateState of bb.accumulate. {errors.received('state', state)} "
            "Where accumulate stands inside another transformation, call tx.update and optax.apply_updates."
        )
    applied: tuple[Any, Any] = tx.update(grads, state, params, and_apply=True, **extra)
    return applied


def _fits(updates: Any, sums: Any) -> bool:
    """Whether the memory of a window's sums can hold its updates, exactly.

    They travel there from the branch that makes them: results of its own would be zeros in the other branch, to be
    written for each micro-batch.
    """
    if jax.tree.structure(updates) != jax.tree.structure(sums):
        return False
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(sums), strict=True)
    return all(u.shape == s.shape and jnp.promote_types(u.dtype, s.dtype) == s.dtype for u, s in pairs)


def _add(state: AccumulateState, grads: Any, items: jax.Array, value: Any) -> AccumulateState:
    """One micro-batch's part in the sums."""
    # A masked micro-batch may hold 0 items; the unit may be anything but that.
    unit = jnp.where(state.micro_batches == 0, jnp.where(items > 0, items, 1), state.unit)
    weight = items / unit

    def add(s: jax.Array, v: jax.Array) -> jax.Array:
        part = weight.astype(s.dtype) * v.astype(s.dtype)
        s = jnp.where(state.micro_batches == 0, 0, s)  # selected: a NaN that is multiplied by zero stays
        return s + jnp.where(items == 0, 0, part)  # a mean over no items is 0/0, and 0 × NaN would be NaN

    return state._replace(
        micro_batches=state.micro_batches + 1,
        items=state.items + items,
        unit=unit,
        loss=add(state.loss, jnp.asarray(jnp.nan if value is None else value)),
        grads=jax.tree.map(add, state.grads, grads),
    )


def _with_noise(
    state: AccumulateState, noise: noisy.NoiseState | None, last: noisy.WindowNoise | None = None
) -> AccumulateState:
    """The state with what is measured in it; nothing where nothing is. `last` is the window's own part."""
    if noise is None:
        return state
    return state._replace(noise=noise, last=state.last._replace(noise=last or noisy.nothing()))


def _is_full(every: Every | UntilNoise, state: AccumulateState) -> Any:
    if isinstance(every, UntilNoise):
        factor = state.unit / state.items
        return noisy.is_enough(every, state.noise, state.micro_batches, state.items, state.grads, factor)
    if isinstance(every, Items):
        return state.items >= every.count
    if not callable(every):
        return True if every == 1 else state.micro_batches >= every
    count = every(state.updates)  # pyright: ignore[reportArgumentType] (a traced integer)
    if isinstance(count, jax.Array) and jnp.issubdtype(count.dtype, jnp.integer) and count.ndim == 0:
        return state.micro_batches >= count
    return state.micro_batches >= errors.check_every(count)


def _if_any(state: AccumulateState, code: int) -> jax.Array:
    return jnp.where(state.micro_batches > 0, code, EMPTY)


def _emptied(grads: Any, updates: jax.Array, inner: Any, last: Update) -> AccumulateState:
    """An empty window. The sums stay where they are, for `_add` selects zeros at the first micro-batch.

    Zeros from here would come out of a `cond` in memory of their own, and cost a copy of the sums a micro-batch.
    """
    return AccumulateState(
        updates=updates,
        micro_batches=jnp.zeros((), jnp.int32),
        items=jnp.zeros((), jnp.result_type(float)),  # arrays of their own each: one array cannot be donated twice
        unit=jnp.ones((), jnp.result_type(float)),
        loss=jnp.zeros((), jnp.result_type(float)),
        grads=grads,
        inner=inner,
        last=last,
    )


def _update(skipped: Any, state: AccumulateState | None = None, norm: Any = jnp.nan) -> Update:
    """What the window came to; without one, nothing yet."""
    return Update(
        micro_batches=jnp.zeros((), jnp.int32) if state is None else state.micro_batches,
        items=jnp.zeros((), jnp.result_type(float)) if state is None else state.items,
        loss=jnp.full((), jnp.nan, jnp.result_type(float)) if state is None else state.loss * state.unit / state.items,
        grad_norm=jnp.asarray(norm, jnp.result_type(float)),
        skipped=jnp.asarray(skipped, jnp.int32),
    )
