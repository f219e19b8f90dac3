"""The state of `accumulate`: what an open window holds, and what the last one came to."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bigbatch import skipped

# The codes of `Update.skipped`. A pytree holds numbers; `Update.reason` has the text of each.
APPLIED, EMPTY, NO_ITEMS, NOT_FINITE, CARRIED, DROPPED, BAD_ITEMS, CHANGED, BAD_EVERY = range(9)
# In place of a number that does not exist. `jax_debug_nans` would stop at a NaN.
NONE = -jnp.inf
# Elements of a parameter that a checksum looks at together on a CPU: as many as a core's first cache holds.
PIECE = 1 << 12


class Update(NamedTuple):
    """The result of the last window: scalar arrays, so that it goes through `jit` and into checkpoints."""

    micro_batches: jax.Array  # how many the window held, int32
    items: jax.Array  # the examples or tokens that they counted for
    loss: jax.Array  # the window's mean of `value` over items; -inf where none was given
    grad_norm: jax.Array  # the 2-norm of the mean gradient, before the inner transformation; -inf where none was taken
    skipped: jax.Array  # 0 where the update was made, int32
    noise: Any = None  # the window's estimate of the gradient's noise, a WindowNoise, where `noise` is measured

    @property
    def reason(self) -> str | None:
        """Why no update was made, or None where it was. The host waits for the device."""
        held = skipped.micro_batches(int(self.micro_batches))
        return {
            APPLIED: None,
            EMPTY: skipped.NO_MICRO_BATCHES,
            NO_ITEMS: skipped.NO_ITEMS,
            NOT_FINITE: skipped.not_finite(float(self.loss), float(self.grad_norm)),
            CARRIED: skipped.CARRIED.format(held=held),
            DROPPED: skipped.DROPPED.format(held=held),
            BAD_ITEMS: skipped.BAD_ITEMS,
            CHANGED: (
                "the params changed inside the window (an update, an assignment, a checkpoint), "
                "so that its gradients are not of one point; change them between windows"
            ),
            BAD_EVERY: "every returned a number below 1; it must be at least 1",
        }[int(self.skipped)]


class AccumulateState(NamedTuple):
    """The state of `accumulate`: the open window's sums, the inner state, and the last window's result."""

    updates: jax.Array  # made so far, and so the index of the next, int32
    micro_batches: jax.Array  # in the open window, int32
    items: jax.Array  # Σ nᵢ; NaN once a micro-batch's items were negative, infinite or NaN
    unit: jax.Array  # the first micro-batch's items; weights are nᵢ / unit, so equal ones are exactly 1
    loss: jax.Array  # Σ nᵢ·lossᵢ / unit
    grads: Any  # Σ nᵢ·gᵢ / unit, at least float32; whatever the window before left there at micro_batches 0
    params: jax.Array  # a checksum of the parameters that the open window began with, uint32; 0 where not known
    inner: Any
    last: Update
    noise: Any = None  # a NoiseState, where noise is measured

    @property
    def factor(self) -> jax.Array:
        """The factor that makes means of the sums; 1 for a window without items."""
        return jnp.where(self.items > 0, self.unit / jnp.where(self.items > 0, self.items, 1), 1)


def emptied(grads: Any, updates: jax.Array, inner: Any, last: Update) -> AccumulateState:
    """An empty window. The sums stay where they are: zeros are selected at the first micro-batch.

    Zeros from here would come out of a `cond` in memory of their own, and cost a copy of the sums a micro-batch.
    """
    return AccumulateState(
        updates=updates,
        micro_batches=jnp.zeros((), jnp.int32),
        items=jnp.zeros((), jnp.result_type(float)),  # arrays of their own each: one array cannot be donated twice
        unit=jnp.ones((), jnp.result_type(float)),
        loss=jnp.zeros((), jnp.result_type(float)),
        grads=grads,
        params=jnp.zeros((), jnp.uint32),
        inner=inner,
        last=last,
    )


def update_of(skipped: Any, state: AccumulateState | None = None, norm: Any = NONE) -> Update:
    """The result of a window; without a state, that of no window yet."""
    return Update(
        micro_batches=jnp.zeros((), jnp.int32) if state is None else state.micro_batches,
        items=jnp.zeros((), jnp.result_type(float)) if state is None else state.items,
        loss=jnp.full((), NONE, jnp.result_type(float)) if state is None else state.loss * state.factor,
        grad_norm=jnp.asarray(norm, jnp.result_type(float)),
        skipped=jnp.asarray(skipped, jnp.int32),
    )


def has_updated(state: AccumulateState) -> jax.Array:
    """Whether the last call made an update: a boolean scalar, to be branched on inside `jit`.

    Inside a `chain`, find the state with `optax.tree.get(opt_state, "AccumulateState")`.
    """
    if not isinstance(state, AccumulateState):
        raise no_accumulate_state(state)
    return (state.micro_batches == 0) & (state.last.skipped == APPLIED)


def no_accumulate_state(state: Any) -> Exception:
    """For a state without a window in it."""
    return TypeError(
        f"The state holds no AccumulateState of bb.accumulate. Received: {type(state).__name__}. "
        "Make the optimizer with bb.accumulate(tx, every=…), and pass the state of its init."
    )


def checksum(params: Any) -> jax.Array:
    """A number of the parameters' bits, uint32 and not 0; two nestings of the same arrays have the same.

    0 and -0 count as one, and so does what a device may flush to 0, for adding an update of zeros makes one the other.
    """
    total = jnp.ones((), jnp.uint32)
    for k, leaf in enumerate(jax.tree.leaves(params)):
        salt = 0x9E3779B9 * (k + 1) % 2**32
        for part in _parts(jnp.asarray(leaf)):
            total += _summed(part, salt)
    return total | 1


def _parts(x: jax.Array) -> list[jax.Array]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return [jax.random.key_data(x)]
    return [x.real, x.imag] if jnp.issubdtype(x.dtype, jnp.complexfloating) else [x]


def _summed(x: jax.Array, salt: int) -> jax.Array:
    """The sum of all elements' mixed bits. On one CPU piece by piece: there XLA makes an array of what it adds up."""

    def mixed(x: jax.Array) -> jax.Array:
        return _mixed(_bits(x) ^ jnp.uint32(salt))

    if jax.default_backend() != "cpu" or jax.device_count() > 1 or x.size <= PIECE:
        return mixed(x).sum(dtype=jnp.uint32)
    flat, full = x.reshape(-1), x.size // PIECE

    def add(i: Any, total: jax.Array) -> jax.Array:
        return total + mixed(jax.lax.dynamic_slice_in_dim(flat, i * PIECE, PIECE))

    total = jax.lax.fori_loop(0, full, add, jnp.zeros(PIECE, jnp.uint32))
    return total.sum(dtype=jnp.uint32) + mixed(flat[full * PIECE :]).sum(dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    """Each element's bits as uint32."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        least = float(jnp.finfo(x.dtype).tiny)
        x = jnp.where(jnp.abs(x) <= (least if least < 1e-30 else 0), jnp.zeros((), x.dtype), x)
    info = jnp.finfo if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo
    if x.dtype == bool or info(x.dtype).bits < 8:
        x = x.astype(jnp.float32)
    x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return (x ^ (x >> 32)).astype(jnp.uint32) if x.dtype.itemsize == 8 else x.astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of uint32 in which one bit changes half of all (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
