"""What packages may call of the speed that is there for JAX.

All of it is for CPUs. Where `applies` is false, the package's plain loop is as fast.
"""

import jax

from bigbatch.fused.jax_conv_layout import with_fast_convolutions as with_fast_convolutions
from bigbatch.fused.jax_deferred import scan as scan


def applies() -> bool:
    """Whether `scan` may do better than a plain loop: on a CPU."""
    return jax.default_backend() == "cpu"
