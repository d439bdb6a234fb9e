"""The neutral vocabulary: what a computation means, whatever framework wrote it.

Each word is a plain torch function. It is the definition, the float64 oracle (called with float64 tensors) and the
fallback at once.
"""

from fusion_core.vocabulary.collective import all_reduce
from fusion_core.vocabulary.norm import add, rms_norm
from fusion_core.vocabulary.operation import Operation, operation

__all__ = ["Operation", "add", "all_reduce", "operation", "rms_norm"]
