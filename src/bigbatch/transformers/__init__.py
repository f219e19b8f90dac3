"""bigbatch for Hugging Face's Trainers: `Trainer` in place of transformers' own, `BigBatch` for any subclass of it."""

from bigbatch import errors as _errors

try:
    from bigbatch.transformers.trainer import BigBatch as BigBatch
    from bigbatch.transformers.trainer import Trainer as Trainer
except ModuleNotFoundError as error:
    raise _errors.not_installed("transformers", "transformers", error) from error
