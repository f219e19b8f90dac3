"""bigbatch for TensorFlow 2 loops: `value_and_grad` for a batch you hold, `Accumulator` for micro-batches."""

from bigbatch.every import items as items
from bigbatch.tensorflow.memory import plan as plan
from bigbatch.tensorflow.split import value_and_grad as value_and_grad
from bigbatch.tensorflow.stream import Accumulator as Accumulator
from bigbatch.tensorflow.stream import Update as Update
