import jax
import pytest

jax.config.update("jax_enable_x64", True)

# What they look at is what XLA makes of a program.
OPTIMIZED = {"test_convolutions", "test_memory"}


@pytest.fixture(autouse=True)
def _compiled_quickly(request):
    """Compiling is most of this room's time. What else is tested here is as true of programs that are not optimized.

    The laws run on optimized ones.
    """
    jax.config.update("jax_disable_most_optimizations", request.path.stem not in OPTIMIZED)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
