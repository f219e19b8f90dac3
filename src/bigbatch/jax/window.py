"""What both APIs ask of items, losses and dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from bigbatch import errors


def as_items(items: Any) -> jax.Array:
    """Accepts a number above zero, or a scalar array, in which 0 counts for nothing.

    What an array holds is refused where it can be read without waiting for the device. Where it cannot, negative and
    infinite items become NaN, which the window's sum of items keeps.
    """
    if not isinstance(items, jax.Array | np.ndarray):
        return jnp.asarray(errors.check_items(items), jnp.result_type(float))
    if items.size != 1 or not (jnp.issubdtype(items.dtype, jnp.integer) or jnp.issubdtype(items.dtype, jnp.floating)):
        errors.check_items(items)  # says what a number is
    value = at_hand(items)
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


def at_hand(x: jax.Array | np.ndarray) -> np.ndarray | None:
    """What an array holds, where that can be read without waiting for the device; else None."""
    array: Any = x  # `is_ready` is not in jax.Array's stub
    if isinstance(x, Tracer) or (isinstance(x, jax.Array) and not (x.is_fully_addressable and array.is_ready())):
        return None
    return np.asarray(x).reshape(())


def check_dtype(dtype: Any) -> None:
    """Accepts the narrowest dtype to add up in, or None."""
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
