"""JAX's windows for `growth.py`, compiled."""

import functools

import jax
import jax.numpy as jnp
from jax_jobs import ON, dense, digits, mlp_loss

import bigbatch.jax as bb

__all__ = ["ON", "PACKAGES", "peaks", "windows"]
PACKAGES = ["jax"]


class Window:
    """One compiled update by SGD with what `gradient` takes of the whole batch."""

    def __init__(self, gradient, width, n, size):
        def step(params, x, y):
            _, grads = gradient(params, x, y)
            return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

        widths, keys = (784, width, width, 10), jax.random.split(jax.random.key(0), 3)
        self.data = digits(n * size)
        self.params = [dense(key, a, b) for key, a, b in zip(keys, widths[:-1], widths[1:], strict=True)]
        self.step = jax.jit(step, donate_argnums=0).lower(self.params, *self.data).compile()
        memory = self.step.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        own = sum(leaf.nbytes for leaf in jax.tree.leaves((self.params, self.data)))
        self.bytes = held + memory.temp_size_in_bytes - own

    def __call__(self):
        self.params = jax.block_until_ready(self.step(self.params, *self.data))


@functools.cache
def windows(width, n, size=16):
    """One window of each way."""

    def by_hand(params, x, y):
        def body(sums, part):
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(mlp_loss)(params, *part)), None

        start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(body, start, [a.reshape(n, size, *a.shape[1:]) for a in (x, y)])
        return jax.tree.map(lambda s: s / n, sums)

    ours = bb.value_and_grad(mlp_loss, micro_batch=size, in_axes=(None, 0, 0))
    return {"by hand": Window(by_hand, width, n, size), "ours, split": Window(ours, width, n, size)}


def peaks(points):
    """Bytes of each way at some (width, micro-batches), by the compiler's account."""
    return [{name: window.bytes for name, window in windows(*point).items()} for point in points]
