"""bigbatch for JAX: `value_and_grad` for a batch you hold, `accumulate` for a loader that yields micro-batches."""

from bigbatch import errors as _errors

try:
    from bigbatch.every import items as items
    from bigbatch.jax.audit import audit as audit
    from bigbatch.jax.aux_outputs import carry as carry
    from bigbatch.jax.checks import check_state as check_state
    from bigbatch.jax.chunked import chunked as chunked
    from bigbatch.jax.noise import noise_scale as noise_scale
    from bigbatch.jax.plan import plan as plan
    from bigbatch.jax.split import value_and_grad as value_and_grad
    from bigbatch.jax.state import AccumulateState as AccumulateState
    from bigbatch.jax.state import Update as Update
    from bigbatch.jax.state import has_updated as has_updated
    from bigbatch.jax.stream import accumulate as accumulate
    from bigbatch.jax.stream import apply_gradients as apply_gradients
    from bigbatch.jax.stream import flush as flush
    from bigbatch.jax.stream import reset as reset
    from bigbatch.noise import NoiseScale as NoiseScale
    from bigbatch.noise import advice as advice
    from bigbatch.noise import until_noise as until_noise
except ModuleNotFoundError as error:
    raise _errors.not_installed("jax", "jax", error) from error
