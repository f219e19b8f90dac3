"""`accumulate`, as the two functions of an optax transformation: each call adds a micro-batch, the last one updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bigbatch import errors
from bigbatch.every import Every, Items
from bigbatch.jax import checks
from bigbatch.jax import noise as noisy
from bigbatch.jax import state as codes
from bigbatch.jax.checks import as_items, as_value, check_parameter, known_value, widened
from bigbatch.jax.state import AccumulateState, checksum, emptied, update_of
from bigbatch.noise import UntilNoise


class Accumulation(NamedTuple):
    """The options of `accumulate`; `measured` is 0, or one in how many windows is measured for noise."""

    tx: optax.GradientTransformationExtraArgs
    every: Every | UntilNoise
    dtype: Any
    partial: str
    measured: int

    def init(self, params: Any) -> AccumulateState:
        """As optax calls it."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            check_parameter(leaf, f"params{jax.tree_util.keystr(path)}")
        inner = self.tx.init(params)
        checks.refuse_line_search(inner)
        sums = jax.tree.map(lambda p: jnp.zeros_like(p, widened(jnp.result_type(p), self.dtype)), params)
        empty = emptied(sums, jnp.zeros((), jnp.int32), inner, update_of(codes.EMPTY))
        return _with_noise(empty, noisy.start()) if self.measured else empty

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        items: Any = None,
        value: Any = None,
        flush: bool = False,
        and_apply: bool = False,  # for `apply_gradients`: the parameters come back in place of updates
        **extra: Any,
    ) -> tuple[Any, AccumulateState]:
        """As optax calls it."""
        checks.check_window(state, updates)
        checks.refuse_functions(extra)
        valued = value is not None
        if flush:
            full, sound, opens = (state.micro_batches > 0) & (self.partial == "apply"), True, False
        else:
            if items is None:
                raise checks.items_missing()
            state = self._taken(state, updates, as_items(items), as_value(value))
            (full, sound), opens = self._is_full(state), state.micro_batches == 1
        if valued or flush:
            extra["value"] = state.loss * state.factor

        inner = _Inner(self.tx, updates, full is True, {"items": state.items, **extra})
        state, like = _wide_enough(inner, state, params)
        step = _Step(self, inner, like, and_apply, flush, full, sound, opens, valued)
        updates, state = step.run(state, params)
        if step.reuses(state):
            ours = codes.has_updated(state)
            updates = jax.tree.map(lambda u, s: jnp.where(ours, s.astype(u.dtype), 0), like, state.grads)
        return updates, state

    def measures(self, state: AccumulateState) -> Any:
        """Whether the open window is measured for noise."""
        return True if self.measured == 1 else state.updates % self.measured == 0

    def _taken(self, state: AccumulateState, grads: Any, items: jax.Array, value: Any) -> AccumulateState:
        if state.noise is not None:
            first = state.micro_batches == 0
            state = state._replace(noise=noisy.taken(state.noise, grads, items, first, self.measures(state)))
        if self.dtype is not None:  # gradients wider than the parameters, as from a loss scaler
            wide = jax.tree.map(lambda s, g: s.astype(jnp.promote_types(s.dtype, g.dtype)), state.grads, grads)
            state = state._replace(grads=wide)
        return _add(state, grads, items, value)

    def _is_full(self, state: AccumulateState) -> tuple[Any, Any]:
        """Whether the window closes, and whether `every` returned a valid number, at least 1."""
        every = self.every
        if isinstance(every, UntilNoise):
            noise: Any = state.noise
            count = state.micro_batches
            return noisy.is_enough(every, noise, count, state.items, state.grads, state.factor), True
        if isinstance(every, Items):
            return ~(state.items < every.count), True  # so that NaN closes it, and the reason is seen
        if not callable(every):
            return True if every == 1 else state.micro_batches >= every, True
        count: Any = every(state.updates)  # pyright: ignore[reportArgumentType] (a traced integer)
        if not (isinstance(count, jax.Array) and jnp.issubdtype(count.dtype, jnp.integer) and count.ndim == 0):
            return state.micro_batches >= errors.check_every(count), True
        known = known_value(count)
        if known is not None:
            return state.micro_batches >= errors.check_every(known.item()), True
        return state.micro_batches >= count, count >= 1


class _Inner(NamedTuple):
    """The inner transformation, to be called on a full window."""

    tx: optax.GradientTransformationExtraArgs
    like: Any  # gradients of the dtypes that it is to be given
    alone: bool  # whether the window is one micro-batch for certain
    extra: dict[str, Any]

    def __call__(self, state: AccumulateState, params: Any) -> tuple[Any, Any]:
        # In a window of one it is exactly 1; saying so spares the rounding of a product fused into tx.
        factor = 1.0 if self.alone else state.unit / state.items
        mean = jax.tree.map(lambda s, g: (s * jnp.asarray(factor, s.dtype)).astype(g.dtype), state.grads, self.like)
        return self.tx.update(mean, state.inner, params, **self.extra)

    def shapes(self, state: AccumulateState, params: Any) -> tuple[Any, Any]:
        """Of what it returns. It forgets `items` and `value` where the transformation takes neither, as contrib.sam."""
        while True:
            try:
                return jax.eval_shape(self, state, params)
            except TypeError as error:
                unknown = [n for n in ("items", "value") if f"unexpected keyword argument '{n}'" in str(error)]
                if not unknown or self.extra.pop(unknown[0], None) is None:
                    raise


class _Step(NamedTuple):
    """What happens to a window once a micro-batch is in, or `flush` is called."""

    of: Accumulation
    apply: _Inner
    like: Any  # the updates' shapes and dtypes; None where the parameters come back
    and_apply: bool
    flush: bool
    full: Any  # whether the window closes
    sound: Any  # whether `every` returned a valid number
    opens: Any  # whether this is the window's first micro-batch
    valued: bool  # whether it came with a loss

    def run(self, state: AccumulateState, params: Any) -> tuple[Any, AccumulateState]:
        """The updates, or None where they are in the memory of the sums; and the state."""
        if self.full is True:
            return self.close(state, params)  # windows of one need no branch
        if self.flush:
            return lax.cond(self.full, self.close, self.end, state, params)
        # One branch for most micro-batches: at each, a GPU's host waits for the condition. Not one `lax.switch`, for
        # which XLA copies the sums.
        return lax.cond(self.full | self.opens, self.close_or_open, self.stay, state, params)

    def reuses(self, state: AccumulateState) -> bool:
        """Whether updates leave the branch that makes them in the memory of a window's sums.

        As results of its own they would be zeros in the other branches, to be written for each micro-batch.
        """
        return not self.and_apply and _holds(state.grads, self.like)

    def stay(self, state: AccumulateState, params: Any) -> tuple[Any, AccumulateState]:
        return self._unmoved(state, params), state

    def close_or_open(self, state: AccumulateState, params: Any) -> tuple[Any, AccumulateState]:
        return lax.cond(self.full, self.close, self.open, state, params)

    def open(self, state: AccumulateState, params: Any) -> tuple[Any, AccumulateState]:
        return self.stay(state._replace(params=_checksum(params)), params)

    def end(self, state: AccumulateState, params: Any) -> tuple[Any, AccumulateState]:
        """A flush that makes no update."""
        some = state.micro_batches > 0
        if self.of.partial == "carry":
            held = state._replace(last=update_of(jnp.where(some, codes.CARRIED, codes.EMPTY), state))
        else:
            last = update_of(jnp.where(some, codes.DROPPED, codes.EMPTY), state)
            held = emptied(state.grads, state.updates, state.inner, last)
        return self._unmoved(state, params), _with_noise(held, state.noise)

    def close(self, state: AccumulateState, params: Any) -> tuple[Any, AccumulateState]:
        wide = jax.tree.map(lambda s: s.astype(widened(s.dtype, jnp.float32)), state.grads)
        norm = optax.tree.norm(wide) * state.factor
        skipped = self._skipped(state, params, norm)
        applied = skipped == codes.APPLIED
        result, held, inner, count = lax.cond(applied, self._made, self._skip, state, params)
        empty = emptied(held, count, inner, update_of(skipped, state, norm))
        if state.noise is None:
            return result, empty
        noise, window = noisy.closed(state.noise, state.items, norm, self.of.measures(state), applied)
        return result, _with_noise(empty, noise, window)

    def _skipped(self, state: AccumulateState, params: Any, norm: jax.Array) -> Any:
        """Why no update is to be made, or APPLIED."""
        loss = state.loss * state.factor
        # At a flush nobody says whether losses were given; where none were, it is -inf.
        finite = jnp.isfinite(norm) & (jnp.isfinite(loss) | jnp.asarray(not self.valued) & (loss == codes.NONE))
        moved: Any = False
        if self.full is not True:
            known = (state.params != 0) & (self.flush | ~jnp.asarray(self.opens))
            moved = False if params is None else known & (_checksum(params) != state.params)
        reasons = (
            (jnp.isnan(state.items), codes.BAD_ITEMS),
            (~jnp.asarray(self.sound), codes.BAD_EVERY),
            (state.items == 0, codes.NO_ITEMS),
            (moved, codes.CHANGED),
            (~finite, codes.NOT_FINITE),
        )
        return jnp.select([holds for holds, _ in reasons], [code for _, code in reasons], codes.APPLIED)

    def _made(self, state: AccumulateState, params: Any) -> tuple[Any, Any, Any, jax.Array]:
        updates, inner = self.apply(state, params)
        inner = jax.tree.map(lambda new, old: _as(new, old.dtype), inner, state.inner)
        held = state.grads
        if self.reuses(state):
            held = jax.tree.map(lambda u, s: u.astype(s.dtype), updates, state.grads)
            updates = None
        elif self.and_apply:
            updates = optax.apply_updates(params, updates)
        return updates, held, inner, state.updates + 1

    def _skip(self, state: AccumulateState, params: Any) -> tuple[Any, Any, Any, jax.Array]:
        return self._unmoved(state, params), state.grads, state.inner, state.updates

    def _unmoved(self, state: AccumulateState, params: Any) -> Any:
        if self.and_apply:
            return params
        return None if self.reuses(state) else optax.tree.zeros_like(self.like)


def _checksum(params: Any) -> jax.Array:
    return jnp.zeros((), jnp.uint32) if params is None else checksum(params)


def _wide_enough(apply: _Inner, state: AccumulateState, params: Any) -> tuple[AccumulateState, Any]:
    """The state with its inner state in the dtypes that `tx` returns it in, and the shapes and dtypes of the updates.

    Gradients wider than the parameters widen an inner state that began in the parameters' dtype, as without us.
    """
    while True:
        like, after = apply.shapes(state, params)
        checks.check_inner(state.inner, after, state.grads, like)
        inner = jax.tree.map(lambda old, new: _as(jnp.asarray(old), _wider(old, new)), state.inner, after)
        same = all(
            old.dtype == jnp.result_type(was)
            for old, was in zip(*map(jax.tree.leaves, (inner, state.inner)), strict=True)
        )
        state = state._replace(inner=inner)
        if same:
            return state, like


def _wider(old: Any, new: Any) -> Any:
    numbers = all(jnp.issubdtype(x, jnp.number) for x in (jnp.result_type(old), new.dtype))
    return jnp.promote_types(jnp.result_type(old), new.dtype) if numbers else jnp.result_type(old)


def _as(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else x.astype(dtype)


def _holds(sums: Any, updates: Any) -> bool:
    """Whether the memory of a window's sums can hold its updates, exactly."""
    if jax.tree.structure(updates) != jax.tree.structure(sums):
        return False
    pairs = zip(jax.tree.leaves(updates), jax.tree.leaves(sums), strict=True)
    return all(u.shape == s.shape and jnp.promote_types(u.dtype, s.dtype) == s.dtype for u, s in pairs)


def _add(state: AccumulateState, grads: Any, items: jax.Array, value: jax.Array | None) -> AccumulateState:
    """One micro-batch's part in the sums."""
    # A masked micro-batch may hold 0 items; the unit may be anything but that.
    unit = jnp.where(state.micro_batches == 0, jnp.where(items > 0, items, 1), state.unit)
    weight = items / unit

    def add(s: jax.Array, v: jax.Array) -> jax.Array:
        # Selected, for NaN times zero is NaN: what the last window left there, and a mean over no items, which is 0/0.
        s = jnp.where(state.micro_batches == 0, 0, s)
        return s + weight.astype(s.dtype) * jnp.where(items == 0, 0, v.astype(s.dtype))

    return state._replace(
        micro_batches=state.micro_batches + 1,
        items=state.items + items,
        unit=unit,
        loss=add(state.loss, jnp.asarray(codes.NONE if value is None else value)),
        grads=jax.tree.map(add, state.grads, grads),
    )


def _with_noise(
    state: AccumulateState, noise: noisy.NoiseState | None, last: noisy.WindowNoise | None = None
) -> AccumulateState:
    """The state with what is measured in it; nothing where nothing is. `last` is the window's own part."""
    if noise is None:
        return state
    return state._replace(noise=noise, last=state.last._replace(noise=last or noisy.nothing()))
