"""vLLM's pass manager without its last pass, whose operators are not in a CPU build."""

from typing import Any

import torch
from vllm.compilation.passes.pass_manager import PostGradPassManager


class WithoutDefunctionalization(PostGradPassManager):
    def configure(self, config: Any) -> None:
        super().configure(config)
        self.fix_functionalization = _Nothing(self.fix_functionalization)


class _Nothing:
    def __init__(self, replaced: Any) -> None:
        self.uuid = replaced.uuid

    def __call__(self, graph: torch.fx.Graph) -> None:
        pass
