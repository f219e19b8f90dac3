"""The stream API: your loader yields micro-batches, and bigbatch stands where optax applies a gradient."""

from typing import Any, Literal, Protocol, TypeVar

import jax.numpy as jnp
import optax

from bigbatch import errors
from bigbatch.every import Every, as_every
from bigbatch.jax.accumulation import Accumulation
from bigbatch.jax.checks import accumulate_states, check_dtype, check_window
from bigbatch.jax.state import AccumulateState, emptied, no_accumulate_state
from bigbatch.noise import UntilNoise, one_in

Params = TypeVar("Params")
State = TypeVar("State")


class _Init(Protocol):
    def __call__(self, params: Any) -> AccumulateState: ...


class _Update(Protocol):
    def __call__(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AccumulateState]: ...


class Accumulate(optax.GradientTransformationExtraArgs):
    """What `accumulate` returns: a transformation of optax. To type checkers its state is an `AccumulateState`."""

    # The fields are optax's; to type checkers a field of a named tuple is final.
    init: _Init  # pyright: ignore[reportIncompatibleVariableOverride]
    update: _Update  # pyright: ignore[reportIncompatibleVariableOverride]


def accumulate(
    tx: optax.GradientTransformation,
    every: Every | UntilNoise,
    *,
    dtype: Any = jnp.float32,
    partial: Literal["apply", "carry", "drop"] = "apply",
    noise: bool | int = False,
) -> Accumulate:
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
    items. A window makes no update and has no effect on later windows where its mean gradient or its loss is inf or
    NaN, where an array held negative, infinite or NaN items, or where the parameters changed inside it; `reason` of
    the state's `last` says which. `update` takes, beside optax's own arguments:

    * `items`, required: what the gradient's loss is the mean of, a number of examples or tokens above zero, or a
      scalar array (`mask.sum()`); 0 in an array counts for nothing.
    * `value`: the micro-batch's mean loss, a scalar. `tx` is given the window's mean of it as its `value`.
    * any other extra argument, which reaches `tx` as given with the window's last micro-batch.

    What stands outside `accumulate`, such as a `chain` or `inject_hyperparams` around it, sees every micro-batch.

    Args:
        tx: an optax gradient transformation, usually the whole optimizer. One that evaluates the loss by itself, such
            as a line search, is refused by `init`.
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
    every = every if isinstance(every, UntilNoise) else as_every(every)
    measured = one_in(noise, every)
    errors.check_choice("partial", partial, ("apply", "carry", "drop"))
    check_dtype(dtype)
    made = Accumulation(optax.with_extra_args_support(tx), every, dtype, partial, measured)
    return Accumulate(made.init, made.update)


def flush(
    tx: optax.GradientTransformationExtraArgs, state: State, params: Params, **extra: Any
) -> tuple[Params, State]:
    """Ends a window that is not full, as `partial` says: at the end of an epoch, or of the data.

    To be called like `tx.update`, under `jit` too; `state.last` then says what was done.

    Args:
        tx: `accumulate(…)`, or an optax transformation with one or several inside, such as a `chain`.
        state: its state.
        params: the parameters.
        **extra: further arguments for the inner transformation.

    Returns:
        `(updates, state)`; the updates are zeros where none was made.

    Raises:
        TypeError: the state holds no `AccumulateState`.
        ValueError: the state is not one of `tx` and `params`.
    """
    if not accumulate_states(state):
        raise no_accumulate_state(state)
    for held in accumulate_states(state):
        check_window(held)  # before the parameters are looked at: it knows those of nnx
    update: Any = tx.update  # optax's own types are narrower than the pytrees that it takes
    return update(optax.tree.zeros_like(params), state, params, flush=True, **extra)


def reset(state: AccumulateState) -> AccumulateState:
    """The same state with an empty window."""
    if not isinstance(state, AccumulateState):
        raise no_accumulate_state(state)
    empty = emptied(optax.tree.zeros_like(state.grads), state.updates, state.inner, state.last)
    return empty._replace(noise=state.noise)


def apply_gradients(
    tx: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: AccumulateState,
    params: Params,
    **extra: Any,
) -> tuple[Params, AccumulateState]:
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
    check_window(state)
    update: Any = tx.update
    return update(grads, state, params, and_apply=True, **extra)
