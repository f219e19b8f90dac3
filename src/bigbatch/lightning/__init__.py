"""bigbatch for Lightning: the callback `Accumulate` makes `accumulate_grad_batches` exact."""

from bigbatch import errors as _errors

try:
    from bigbatch.lightning.accumulate import Accumulate as Accumulate
    from bigbatch.torch.update import Update as Update
except ModuleNotFoundError as error:
    raise _errors.not_installed("lightning", "lightning", error) from error
