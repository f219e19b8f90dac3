"""bigbatch for TensorFlow 1 graphs and sessions: `Accumulator` around any `tf.compat.v1.train.Optimizer`."""

from bigbatch.every import items as items
from bigbatch.tf1.hook import FlushHook as FlushHook
from bigbatch.tf1.stream import Accumulator as Accumulator
from bigbatch.tf1.stream import Update as Update
