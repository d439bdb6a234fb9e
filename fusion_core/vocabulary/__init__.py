"""The neutral vocabulary: what a computation means, whatever framework wrote it.

Each word is a plain torch function. It is the definition, the float64 oracle (called with float64 tensors) and the
fallback at once.
"""

from fusion_core.vocabulary import fp4, fp8
from fusion_core.vocabulary.collective import all_reduce
from fusion_core.vocabulary.norm import add, rms_norm
from fusion_core.vocabulary.operation import Operation, operation

quantize_static_fp8 = Operation(fp8.quantize_static_fp8, results=("quantized",))
quantize_token_fp8 = Operation(fp8.quantize_token_fp8, results=("quantized", "scale"))
quantize_group_fp8 = Operation(fp8.quantize_group_fp8, results=("quantized", "scale"))
quantize_nvfp4 = Operation(fp4.quantize_nvfp4, results=("quantized", "scale"))
quantize_mxfp4 = Operation(fp4.quantize_mxfp4, results=("quantized", "scale"))

__all__ = [
    "Operation",
    "add",
    "all_reduce",
    "operation",
    "quantize_group_fp8",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "quantize_static_fp8",
    "quantize_token_fp8",
    "rms_norm",
]
