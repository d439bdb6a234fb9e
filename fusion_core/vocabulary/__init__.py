"""The neutral vocabulary: words for computations, independent of the framework that wrote them.

Each word is a plain torch function. It is the definition, the float64 oracle (called with float64 tensors) and the
fallback at once.
"""

from fusion_core.vocabulary import fp4, fp8
from fusion_core.vocabulary.collective import all_reduce
from fusion_core.vocabulary.norm import add, add_bias, layer_norm, rms_norm
from fusion_core.vocabulary.operation import Operation, operation
from fusion_core.vocabulary.sharded import (
    all_gather_shard,
    mean_square_over_ranks,
    mean_squares_over_ranks,
    scale_by_rms,
)

quantize_static_fp8 = Operation(fp8.quantize_static_fp8, results=("quantized",))
quantize_token_fp8 = Operation(fp8.quantize_token_fp8, results=("quantized", "scale"))
quantize_group_fp8 = Operation(fp8.quantize_group_fp8, results=("quantized", "scale"))
quantize_nvfp4 = Operation(fp4.quantize_nvfp4, results=("quantized", "scale"))
quantize_mxfp4 = Operation(fp4.quantize_mxfp4, results=("quantized", "scale"))

__all__ = [
    "Operation",
    "add",
    "add_bias",
    "all_gather_shard",
    "all_reduce",
    "layer_norm",
    "mean_square_over_ranks",
    "mean_squares_over_ranks",
    "operation",
    "quantize_group_fp8",
    "quantize_mxfp4",
    "quantize_nvfp4",
    "quantize_static_fp8",
    "quantize_token_fp8",
    "rms_norm",
    "scale_by_rms",
]
