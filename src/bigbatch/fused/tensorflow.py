"""What `bigbatch.tensorflow`, `bigbatch.tf1` and `bigbatch.keras` call of the speed wing for TensorFlow."""

from bigbatch.fused.tensorflow_conv_layout import with_fast_convolutions as with_fast_convolutions
from bigbatch.fused.tensorflow_deferred import FEW as FEW
from bigbatch.fused.tensorflow_deferred import FactorBuffer as FactorBuffer
from bigbatch.fused.tensorflow_deferred import FactoredGrad as FactoredGrad
from bigbatch.fused.tensorflow_deferred import capacity as capacity
from bigbatch.fused.tensorflow_deferred import factored_grad as factored_grad
from bigbatch.fused.tensorflow_deferred import factors_of as factors_of
from bigbatch.fused.tensorflow_deferred import row_capacity as row_capacity
from bigbatch.fused.tensorflow_lookups import SplitGradient as SplitGradient
from bigbatch.fused.tensorflow_lookups import split_gradient as split_gradient
from bigbatch.fused.tensorflow_lookups import zeros as zeros
from bigbatch.fused.tensorflow_split import add as add
from bigbatch.fused.tensorflow_split import loop as loop
from bigbatch.fused.tensorflow_split import rewritten as rewritten
from bigbatch.fused.tensorflow_split import stored as stored
from bigbatch.fused.tensorflow_stream import DeferredSum as DeferredSum
from bigbatch.fused.tensorflow_stream import is_large as is_large
from bigbatch.fused.tensorflow_stream import terms as terms
from bigbatch.fused.tensorflow_transposes import with_fast_products as with_fast_products
