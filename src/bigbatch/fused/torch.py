"""What the packages may ask of the fused path of PyTorch (see `torch_backward`)."""

from bigbatch.fused.torch_backward import CALLS as CALLS
from bigbatch.fused.torch_backward import FusedBackward as FusedBackward
from bigbatch.fused.torch_backward import FusedPath as FusedPath
from bigbatch.fused.torch_proof import Known as Known
