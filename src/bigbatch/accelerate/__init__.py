"""bigbatch for Accelerate: `backward` takes the place of `accelerator.backward`, and the rest of the loop stays."""

from bigbatch import errors as _errors

try:
    from bigbatch.accelerate.backward import backward as backward
    from bigbatch.accelerate.backward import flush as flush
    from bigbatch.torch.update import Update as Update
except ModuleNotFoundError as error:
    raise _errors.not_installed("accelerate", "accelerate", error) from error
