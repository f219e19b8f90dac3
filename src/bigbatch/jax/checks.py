"""What the two APIs refuse: arguments and items; then the state and the gradients that `accumulate` is given."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from bigbatch import errors
from bigbatch.jax.state import BAD_EVERY, AccumulateState, Update, emptied, no_accumulate_state, update_of

# Extra arguments that are functions of the last micro-batch's data, or its gradient.
OF_ONE_MICRO_BATCH = ("grad", "value_fn", "obj_fn", "grad_fn")


def as_items(items: Any) -> jax.Array:
    """Accepts a number above zero, or a scalar array, in which 0 counts for nothing.

    Bad items in an array are refused where they can be read without waiting for the device. Where they cannot,
    negative and infinite items become NaN, and so does the window's sum of items.
    """
    if not isinstance(items, jax.Array | np.ndarray):
        return jnp.asarray(errors.check_items(items), jnp.result_type(float))
    if items.size != 1 or not (jnp.issubdtype(items.dtype, jnp.integer) or jnp.issubdtype(items.dtype, jnp.floating)):
        errors.check_items(items)  # raises
    value = known_value(items)
    if value is not None and value != 0:
        errors.check_items(float(value))
    # As wide as a Python float here: a sum of bf16 counts would stop at 256.
    wide = jnp.asarray(items, jnp.result_type(float)).reshape(())
    return wide if value is not None else jnp.where(jnp.isfinite(wide) & (wide >= 0), wide, jnp.nan)


def as_value(value: Any) -> jax.Array | None:
    """Accepts a micro-batch's mean loss: one real number; or None, where there is none."""
    if value is None:
        return None
    number = isinstance(value, jax.Array | np.ndarray | np.generic | int | float)
    dtype = jnp.result_type(value) if number else bool
    if np.shape(value) != () or not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(
            f"value must be a scalar, the micro-batch's mean loss. {errors.received('value', value)} "
            "Pass the mean over the micro-batch's items, as loss.mean() does."
        )
    return jnp.asarray(value)


def known_value(x: jax.Array | np.ndarray) -> np.ndarray | None:
    """A scalar array's value, where it can be read without waiting for the device; else None."""
    array: Any = x  # `is_ready` is not in jax.Array's stub; tests/jax/test_private.py
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and not (x.is_fully_addressable and array.is_ready())):
        return None
    return np.asarray(x).reshape(())


def check_dtype(dtype: Any) -> None:
    """Accepts a floating dtype, the narrowest to add up in, or None."""
    try:
        fits = not isinstance(dtype, str) and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        fits = False
    if dtype is not None and not fits:
        raise TypeError(
            f"dtype must be a floating dtype such as jnp.float32, or None. {errors.received('dtype', dtype)} "
            "None adds up in the parameters' own dtype."
        )


def check_parameter(value: Any, where: str, floating: bool = False) -> None:
    """Refuses a parameter that is not an array, such as a function in an Equinox module.

    Args:
        value: a leaf of the parameters.
        where: what to call it in the error.
        floating: whether it must be of a floating or complex type, as for `jax.grad`.
    """
    number = isinstance(value, jax.Array | np.ndarray | np.generic | float | complex | int)
    if not number or (floating and not jnp.issubdtype(jnp.result_type(value), jnp.inexact)):
        raise TypeError(
            f"Parameters must be arrays{' of a floating type' if floating else ''}. {errors.received(where, value)} "
            "Partition a module first, and pass its parameters: eqx.partition(model, eqx.is_inexact_array) in Equinox, "
            "nnx.split(model, nnx.Param, ...) in Flax."
        )


def widened(dtype: Any, narrowest: Any) -> Any:
    """The dtype to add up in."""
    return dtype if narrowest is None else jnp.promote_types(dtype, narrowest)


def check_argnums(argnums: Any) -> None:
    """Accepts an integer, or several different ones."""
    numbers = argnums if isinstance(argnums, tuple | list) else (argnums,)
    if not all(isinstance(k, int) and not isinstance(k, bool) for k in numbers):
        raise TypeError(f"argnums must be an integer, or a tuple of them. {errors.received('argnums', argnums)}")
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"argnums must name at least one argument, and each once. {errors.received('argnums', argnums)} "
            "Pass the number of the parameters' positional argument."
        )


def accumulate_states(state: Any) -> list[AccumulateState]:
    """All states of `accumulate` in an optimizer's state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, AccumulateState))
    return [leaf for leaf in leaves if isinstance(leaf, AccumulateState)]


def items_missing() -> Exception:
    """For an update without items; Flax's TrainState passes none on."""
    return TypeError(
        "items must be a number. Received: items=None (NoneType). "
        "Pass the number of examples or tokens the loss is the mean of: "
        "tx.update(grads, opt_state, params, items=n). Flax's TrainState.apply_gradients passes none on; call "
        "bb.apply_gradients(state.tx, grads, state.opt_state, state.params, items=n) in its place."
    )


def check_state(tx: optax.GradientTransformation, state: Any, params: Any) -> Any:
    """Refuses a state, such as one from a checkpoint, that does not belong to `tx` and `params`.

    `update` itself checks the structure, shapes and dtypes of the window, and the values that it can read without
    waiting. This function checks the whole state, including the inner one. The host waits for the device. Do not call
    it under `jit`::

        opt_state = bb.check_state(tx, checkpointer.restore(path, target), params)

    Args:
        tx: `accumulate(…)`, or a transformation with one or several inside.
        state: its state.
        params: the parameters.

    Returns:
        The state.

    Raises:
        TypeError: the state holds no `AccumulateState`.
        ValueError: an entry has another place, shape or dtype than `tx.init(params)` gives it, or a count is no number
            that a count can be.
    """
    if not accumulate_states(state):
        raise no_accumulate_state(state)
    _compare("state", state, jax.eval_shape(tx.init, params))
    for one in accumulate_states(jax.device_get(state)):
        _check_counts(one)
    return state


def check_window(state: Any, grads: Any = None) -> None:
    """Refuses a state that is not of `accumulate`, and gradients of other parameters than the state was made for."""
    if not isinstance(state, AccumulateState):
        raise no_accumulate_state(state)
    if _is_of_nnx(state):
        raise TypeError(
            "The state is made of Flax nnx variables. Received: the opt_state of an nnx.Optimizer. "
            "Call optimizer.update(model, grads, items=n) for a micro-batch, and "
            "optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)), flush=True) "
            "in place of bb.flush."
        )
    if not isinstance(state.last, Update):
        raise _mismatch("state.last", state.last, "an Update")
    own = emptied(None, jnp.zeros((), jnp.int32), None, update_of(0))
    _compare("state", state._replace(grads=None, inner=None, noise=None, last=state.last._replace(noise=None)), own)
    _check_counts(state)
    if grads is not None:
        _check_gradients(state.grads, grads)


def check_inner(before: Any, after: Any, sums: Any, updates: Any) -> None:
    """Refuses an inner state whose structure or shapes `tx` changes, or with which it makes updates of other shapes."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise _mismatch("state.inner", before, f"nested as {jax.tree.structure(after)} (or tx changes it as it runs)")
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if jnp.shape(old) != jnp.shape(new):
            raise _mismatch("state.inner" + jax.tree_util.keystr(path), old, f"of shape {jnp.shape(new)}")
    if jax.tree.structure(sums) == jax.tree.structure(updates):
        for sum_, update in zip(jax.tree.leaves(sums), jax.tree.leaves(updates), strict=True):
            if sum_.shape != update.shape:
                expected = f"one that makes updates of shape {sum_.shape}, not {update.shape}"
                raise _mismatch("state.inner", before, expected)


def refuse_line_search(inner: Any) -> None:
    """Refuses an optax transformation that evaluates the loss by itself. Its state's type shows it."""
    kinds = (  # tests/jax/test_private.py
        optax.ScaleByZoomLinesearchState,
        optax.ScaleByBacktrackingLinesearchState,
        optax.contrib.HutchinsonState,
    )
    for leaf in jax.tree.leaves(inner, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(leaf, kinds):
            raise _evaluates(type(leaf).__name__)


def refuse_functions(extra: dict[str, Any]) -> None:
    """Refuses extra arguments that only a transformation that evaluates the loss by itself takes."""
    for name in OF_ONE_MICRO_BATCH:
        if name in extra:
            raise _evaluates(f"{name}=…")


def _evaluates(received: str) -> Exception:
    return TypeError(
        "A line search (or an estimate of the Hessian) evaluates the loss by itself, with a value_fn or obj_fn that "
        f"knows the last micro-batch only, where it needs the window's. Received: {received}. "
        "Leave it out, as in optax.lbfgs(linesearch=None), or use the split API: bb.value_and_grad gives the whole "
        "batch's loss and gradient, and a value_fn made of it the whole batch's loss."
    )


def _is_of_nnx(state: Any) -> bool:
    nnx: Any = sys.modules.get("flax.nnx")  # where nobody has imported it, there are no nnx variables
    if nnx is None:
        return False
    return any(
        isinstance(x, nnx.Variable) for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )


def _check_gradients(sums: Any, grads: Any) -> None:
    if jax.tree.structure(sums) != jax.tree.structure(grads):
        raise ValueError(
            "grads must be nested as the parameters that init was given. "
            f"Received: {jax.tree.structure(grads)} where the state has {jax.tree.structure(sums)}."
        )
    for (path, sum_), grad in zip(jax.tree_util.tree_leaves_with_path(sums), jax.tree.leaves(grads), strict=True):
        if jnp.shape(sum_) != jnp.shape(grad):
            raise ValueError(
                "grads must have the shapes of the parameters that init was given. "
                f"{errors.received('grads' + jax.tree_util.keystr(path), grad)} The state has {jnp.shape(sum_)}."
            )


def _check_counts(state: AccumulateState) -> None:
    """Refuses values that no count can have, where they can be read without waiting."""
    for name, largest, array in (
        ("updates", jnp.inf, state.updates),
        ("micro_batches", jnp.inf, state.micro_batches),
        ("items", jnp.inf, state.items),
        ("unit", jnp.inf, state.unit),
        ("last.skipped", BAD_EVERY, state.last.skipped),
    ):
        value = known_value(array)
        if value is not None and (value < 0 or value == jnp.inf or value > largest):
            raise ValueError(
                f"state.{name} must be a finite number of at least 0. Received: state.{name}={value}. "
                "The state is damaged; restore another checkpoint, or begin with tx.init(params)."
            )


def _compare(name: str, state: Any, expected: Any) -> None:
    """Refuses a state of another structure, or with a leaf of another shape or of a narrower dtype."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise _mismatch(name, state, f"nested as {jax.tree.structure(expected)}")
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        if jnp.shape(leaf) != jnp.shape(like) or not _is_as_wide(jnp.result_type(leaf), jnp.result_type(like)):
            raise _mismatch(name + jax.tree_util.keystr(path), leaf, f"of shape {like.shape}, dtype {like.dtype}")


def _is_as_wide(dtype: Any, expected: Any) -> bool:
    """Whether `dtype` is the expected one, or a wider floating one: gradients wider than the parameters widen it."""
    if dtype == expected:
        return True
    return jnp.issubdtype(expected, jnp.inexact) and jnp.promote_types(dtype, expected) == dtype


def _mismatch(where: str, value: Any, expected: str) -> Exception:
    shown = errors.received(where, value) if hasattr(value, "dtype") else f"Received: {jax.tree.structure(value)}."
    return ValueError(
        f"The state is not one of this transformation and these parameters: {where} must be {expected}. {shown} "
        "Restore a checkpoint into the structure of tx.init(params), with the same options and jax_enable_x64."
    )
