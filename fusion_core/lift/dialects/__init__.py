"""How the operators of each framework read in the neutral vocabulary."""

from fusion_core.lift.dialect import Dialect
from fusion_core.lift.dialects import flashinfer, torchao, vllm

CORE_DIALECTS: tuple[Dialect, ...] = (torchao.DIALECT, flashinfer.DIALECT, vllm.DIALECT)
"""The library's own dialects of frameworks; a plugin's reading of the same operator counts instead."""

__all__ = ["CORE_DIALECTS"]
