"""bigbatch for PyTorch: `backward` for a batch you hold, `Accumulator` for a loader that yields micro-batches."""

from bigbatch.every import items as items
from bigbatch.torch.auto import plan as plan
from bigbatch.torch.split import backward as backward
from bigbatch.torch.stream import Accumulator as Accumulator
from bigbatch.torch.stream import Update as Update
