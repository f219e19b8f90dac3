"""bigbatch for Keras 3: `accumulate(model, micro_batch=32)` or `accumulate(model, every=64)`, then `fit`."""

from bigbatch import errors as _errors

try:
    from bigbatch.every import items as items
    from bigbatch.keras.accumulate import accumulate as accumulate
    from bigbatch.keras.audit import audit as audit
    from bigbatch.keras.noise import noise_scale as noise_scale
    from bigbatch.keras.plan import plan as plan
    from bigbatch.noise import NoiseScale as NoiseScale
    from bigbatch.noise import advice as advice
except ModuleNotFoundError as error:
    raise _errors.not_installed("keras", "keras", error) from error
