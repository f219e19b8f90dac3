"""bigbatch for TensorFlow 2 loops: `value_and_grad` for a batch you hold, `Accumulator` for micro-batches."""

from bigbatch import errors as _errors

try:
    from bigbatch.every import items as items
    from bigbatch.noise import NoiseScale as NoiseScale
    from bigbatch.noise import advice as advice
    from bigbatch.noise import noise_curve as noise_curve
    from bigbatch.noise import until_noise as until_noise
    from bigbatch.tensorflow.audit import audit as audit
    from bigbatch.tensorflow.chunked import chunked as chunked
    from bigbatch.tensorflow.plan import plan as plan
    from bigbatch.tensorflow.split import value_and_grad as value_and_grad
    from bigbatch.tensorflow.stream import Accumulator as Accumulator
    from bigbatch.tensorflow.stream import Update as Update
except ModuleNotFoundError as error:
    raise _errors.not_installed("tensorflow", "tensorflow", error) from error
