"""The noise scale in the state of `accumulate` (see `bigbatch.noise`): arrays, so that it lives under `jit`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bigbatch.jax.checks import widened
from bigbatch.jax.state import NONE
from bigbatch.noise import EMPTY, NoiseScale, UntilNoise, averaged, estimate

DECAY = NoiseScale().decay


class WindowNoise(NamedTuple):
    """What one window says of the noise in its gradient; -inf where it was not measured. Scalar arrays."""

    micro_batches: jax.Array  # that held items, int32
    items: jax.Array
    trace: jax.Array  # the variance of one item's gradient, summed over all parameters
    squared_norm: jax.Array  # the true gradient's; noise may make it negative


class NoiseState(NamedTuple):
    """The open window's sums, and the running moments. Scalar arrays."""

    squares: jax.Array  # Σ bᵢ‖gᵢ‖²
    counted: jax.Array  # micro-batches that held items, int32
    windows: jax.Array  # in the running moments, int32
    moments: tuple[jax.Array, ...]


def noise_scale(state: Any) -> NoiseScale:
    """The running noise scale, of the windows that were measured. The host waits for the device.

    Args:
        state: the state of `bb.accumulate(…, noise=True)`, or an optimizer's state with one inside.

    Raises:
        ValueError: there is none, or it measures no noise.
    """
    found = optax.tree.get(state, "NoiseState")
    if found is None:
        raise ValueError("The state measures no noise. Pass noise=True to bb.accumulate.")
    running = NoiseScale(DECAY)
    running.load_state_dict({"decay": DECAY, "windows": int(found.windows), "moments": jax.device_get(found.moments)})
    return running


def start() -> NoiseState:
    """Before the first window."""
    return NoiseState(
        squares=_float(0.0),
        counted=jnp.zeros((), jnp.int32),
        windows=jnp.zeros((), jnp.int32),
        moments=tuple(_float(x) for x in EMPTY),
    )


def taken(noise: NoiseState, grads: Any, items: jax.Array, first: jax.Array, measures: Any) -> NoiseState:
    """With one micro-batch's gradient in it; `measures` says whether this window is measured."""

    def square() -> jax.Array:
        # A mean over no items is 0/0, and counts for nothing.
        return jnp.where(items == 0, 0, items * _float(_square(grads)))

    more = square() if measures is True else lax.cond(measures, square, lambda: _float(0.0))
    counted = (items > 0).astype(jnp.int32)
    return noise._replace(
        squares=jnp.where(first, 0, noise.squares) + more, counted=jnp.where(first, 0, noise.counted) + counted
    )


def closed(
    noise: NoiseState, items: jax.Array, norm: jax.Array, measures: Any, applied: jax.Array
) -> tuple[NoiseState, WindowNoise]:
    """After a window with this mean gradient's norm: the state, and the window's own part."""
    now = _window(noise, items, norm)
    good = measures & applied & jnp.isfinite(now.trace) & jnp.isfinite(now.squared_norm)
    last = jax.tree.map(lambda new, nothing: jnp.where(measures, new, nothing), now, nothing())
    moments = averaged(noise.moments, now.trace, now.squared_norm, DECAY)
    after = noise._replace(
        windows=noise.windows + good,
        moments=tuple(jnp.where(good, new, old) for new, old in zip(moments, noise.moments, strict=True)),
    )
    return after, last


def is_enough(every: UntilNoise, noise: NoiseState, count: jax.Array, items: jax.Array, sums: Any, factor: Any) -> Any:
    """Whether the window closes here; the sum's norm is taken only where the window is looked at."""
    looks = jnp.zeros(every.at_most + 1, bool).at[jnp.asarray(every.looks)].set(True)

    def look() -> jax.Array:
        now = _window(noise, items, jnp.sqrt(_square(sums)) * factor)
        return every.is_enough(items, now.trace, now.squared_norm)

    full = count >= every.at_most
    return full | lax.cond(looks[jnp.minimum(count, every.at_most)] & ~full, look, lambda: jnp.zeros((), bool))


def _window(noise: NoiseState, items: jax.Array, norm: jax.Array) -> WindowNoise:
    some = noise.counted > 1  # of fewer nothing is known; the formula is given two, for it would divide by 0
    counted, total = jnp.maximum(noise.counted, 2), jnp.where(some, items, 1)
    trace, squared_norm = estimate(counted, total, noise.squares, _float(norm) ** 2)
    return WindowNoise(noise.counted, _float(items), jnp.where(some, trace, NONE), jnp.where(some, squared_norm, NONE))


def nothing() -> WindowNoise:
    """Of a window that was not measured."""
    return WindowNoise(jnp.zeros((), jnp.int32), _float(0.0), _float(NONE), _float(NONE))


def _square(tree: Any) -> jax.Array:
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(widened(g.dtype, jnp.float32)), tree), squared=True)


def _float(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.result_type(float))
