"""What `accumulate` refuses of its state, its gradients and the transformation inside, before anything is added up."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bigbatch import errors
from bigbatch.jax.state import BAD_EVERY, AccumulateState, Update, emptied, not_accumulated, update_of
from bigbatch.jax.window import at_hand

# Extra arguments that are functions of the last micro-batch's data, or its gradient.
OF_ONE_MICRO_BATCH = ("grad", "value_fn", "obj_fn", "grad_fn")


def accumulated(state: Any) -> list[AccumulateState]:
    """All states of `accumulate` in an optimizer's state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, AccumulateState))
    return [leaf for leaf in leaves if isinstance(leaf, AccumulateState)]


def items_missing() -> Exception:
    """For an update that was not told its items; Flax's TrainState passes none on."""
    return TypeError(
        "items must be a number. Received: items=None (NoneType). "
        "Pass the number of examples or tokens the loss is the mean of: "
        "tx.update(grads, opt_state, params, items=n). Flax's TrainState.apply_gradients passes none on; call "
        "bb.apply_gradients(state.tx, grads, state.opt_state, state.params, items=n) in its place."
    )


def check_state(tx: optax.GradientTransformation, state: Any, params: Any) -> Any:
    """Refuses a state, such as one from a checkpoint, that is not one of `tx` and `params`.

    `update` itself checks the structure, shapes and dtypes of the window, and values that can be read without waiting.
    This checks all of the state, the inner one too. The host waits for the device. Not to be called under `jit`::

        opt_state = bb.check_state(tx, checkpointer.restore(path, target), params)

    Args:
        tx: `accumulate(…)`, or a transformation with one or several inside.
        state: its state.
        params: the parameters.

    Returns:
        The state.

    Raises:
        TypeError: the state holds no `AccumulateState`.
        ValueError: an entry has another place, shape or dtype than `tx.init(params)` gives it, or a count is not one.
    """
    if not accumulated(state):
        raise not_accumulated(state)
    _compare("state", state, jax.eval_shape(tx.init, params))
    for held in accumulated(jax.device_get(state)):
        _check_counts(held)
    return state


def check_window(state: Any, grads: Any = None) -> None:
    """Refuses a state that is not `accumulate`'s, and gradients that are not of the parameters that it was made for."""
    if not isinstance(state, AccumulateState):
        raise not_accumulated(state)
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
    """Refuses an inner state that comes back in another structure or shape, or makes updates of another shape."""
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise _mismatch("state.inner", before, f"nested as {jax.tree.structure(after)} (or tx changes it as it runs)")
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if jnp.shape(old) != jnp.shape(new):
            raise _mismatch("state.inner" + jax.tree_util.keystr(path), old, f"of shape {jnp.shape(new)}")
    if jax.tree.structure(sums) == jax.tree.structure(updates):
        for sum_, made in zip(jax.tree.leaves(sums), jax.tree.leaves(updates), strict=True):
            if sum_.shape != made.shape:
                raise _mismatch(
                    "state.inner", before, f"one that makes updates of shape {sum_.shape}, not {made.shape}"
                )


def refuse_line_search(inner: Any) -> None:
    """Refuses, by its state, a transformation of optax's that evaluates the loss by itself."""
    kinds = (
        optax.ScaleByZoomLinesearchState,
        optax.ScaleByBacktrackingLinesearchState,
        optax.contrib.HutchinsonState,
    )
    found = [x for x in jax.tree.leaves(inner, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]
    if found:
        raise _evaluates(type(found[0]).__name__)


def refuse_functions(extra: dict[str, Any]) -> None:
    """Refuses extra arguments that only a transformation takes that evaluates the loss by itself."""
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
    nnx: Any = sys.modules.get("flax.nnx")  # where nobody has imported it, nothing is of it
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
    """Refuses counts that none can be, where they can be read without waiting."""
    for name, least, values in (
        ("updates", 0, state.updates),
        ("micro_batches", 0, state.micro_batches),
        ("items", 0, state.items),
        ("unit", 0, state.unit),
        ("last.skipped", 0, state.last.skipped),
    ):
        value = at_hand(values)
        if value is not None and (value < least or value == jnp.inf or (name == "last.skipped" and value > BAD_EVERY)):
            raise ValueError(
                f"state.{name} must be a finite number of at least 0. Received: state.{name}={value}. "
                "The state is damaged; restore another checkpoint, or begin with tx.init(params)."
            )


def _compare(name: str, state: Any, expected: Any) -> None:
    """Refuses what is nested otherwise, or has a leaf of another shape, or of a dtype that is not as wide."""
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise _mismatch(name, state, f"nested as {jax.tree.structure(expected)}")
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True):
        fits = jnp.shape(leaf) == jnp.shape(like) and _holds(jnp.result_type(leaf), jnp.result_type(like))
        if not fits:
            raise _mismatch(name + jax.tree_util.keystr(path), leaf, f"of shape {like.shape}, dtype {like.dtype}")


def _holds(dtype: Any, expected: Any) -> bool:
    """Whether it is that dtype, or a wider one of its kind, which gradients wider than the parameters make of it."""
    if dtype == expected:
        return True
    return jnp.issubdtype(expected, jnp.inexact) and jnp.promote_types(dtype, expected) == dtype


def _mismatch(where: str, value: Any, expected: str) -> Exception:
    shown = errors.received(where, value) if hasattr(value, "dtype") else f"Received: {jax.tree.structure(value)}."
    return ValueError(
        f"The state is not one of this transformation and these parameters: {where} must be {expected}. {shown} "
        "Restore a checkpoint into the structure of tx.init(params), with the same options and jax_enable_x64."
    )
