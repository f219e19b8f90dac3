"""What both doors ask of items and dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch import errors


def as_items(items: Any) -> jax.Array:
    """Accepts a number above zero, or a scalar array, whose value may be unknown until the program runs."""
    if not isinstance(items, jax.Array | np.ndarray):
        return jnp.asarray(errors.check_items(items), jnp.result_type(float))
    if items.size != 1 or not (jnp.issubdtype(items.dtype, jnp.integer) or jnp.issubdtype(items.dtype, jnp.floating)):
        errors.check_items(items)  # says what a number is
    # As wide as a Python float here: a sum of bf16 counts would stop at 256.
    return jnp.asarray(items, jnp.result_type(float)).reshape(())


def widened(dtype: Any, narrowest: Any) -> Any:
    """The dtype to add up in."""
    return dtype if narrowest is None else jnp.promote_types(dtype, narrowest)
