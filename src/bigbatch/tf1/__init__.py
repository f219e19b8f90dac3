"""bigbatch for TensorFlow 1 graphs and sessions: `Accumulator` around any `tf.compat.v1.train.Optimizer`."""

from bigbatch import errors as _errors

try:
    from bigbatch.every import items as items
    from bigbatch.tf1.hook import FlushHook as FlushHook
    from bigbatch.tf1.stream import Accumulator as Accumulator
    from bigbatch.tf1.stream import Update as Update
except ModuleNotFoundError as error:
    raise _errors.not_installed("tf1", "tensorflow", error) from error
