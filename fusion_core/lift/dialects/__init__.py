"""The library's readings of other frameworks' operators."""

from fusion_core.lift.dialect import Dialect
from fusion_core.lift.dialects import flashinfer, torchao, vllm

CORE_DIALECTS: tuple[Dialect, ...] = (torchao.DIALECT, flashinfer.DIALECT, vllm.DIALECT)
"""The library's own dialects; a plugin's reading of the same operator replaces the library's."""

__all__ = ["CORE_DIALECTS"]
