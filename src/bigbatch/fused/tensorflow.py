"""What `bigbatch.tensorflow` calls of the speed wing."""

from bigbatch.fused.tensorflow_deferred import FactoredGrad as FactoredGrad
from bigbatch.fused.tensorflow_lookups import zeros as zeros
from bigbatch.fused.tensorflow_split import add as add
from bigbatch.fused.tensorflow_split import loop as loop
from bigbatch.fused.tensorflow_split import rewritten as rewritten
from bigbatch.fused.tensorflow_split import stored as stored
from bigbatch.fused.tensorflow_stream import DeferredSum as DeferredSum
from bigbatch.fused.tensorflow_stream import is_large as is_large
from bigbatch.fused.tensorflow_stream import terms as terms
from bigbatch.fused.tensorflow_transposes import with_fast_products as with_fast_products
