"""bigbatch for PyTorch: `backward` for a batch you hold, `Accumulator` for a loader that yields micro-batches."""

from bigbatch import errors as _errors

try:
    from bigbatch.every import items as items
    from bigbatch.lengths import tokens as tokens
    from bigbatch.noise import NoiseScale as NoiseScale
    from bigbatch.noise import advice as advice
    from bigbatch.noise import noise_curve as noise_curve
    from bigbatch.noise import until_noise as until_noise
    from bigbatch.torch.audit import audit as audit
    from bigbatch.torch.causal import causal_items as causal_items
    from bigbatch.torch.chunked import chunked as chunked
    from bigbatch.torch.gathered import gathered as gathered
    from bigbatch.torch.gradients import Gradients as Gradients
    from bigbatch.torch.lengths import micro_batches as micro_batches
    from bigbatch.torch.plan import plan as plan
    from bigbatch.torch.split import backward as backward
    from bigbatch.torch.stream import Accumulator as Accumulator
    from bigbatch.torch.update import Update as Update
except ModuleNotFoundError as error:
    raise _errors.not_installed("torch", "torch", error) from error
