"""fusion_core's pass as a pass of vLLM's."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.logger import init_logger

import fusion_core
from fusion_core import FusionConfig, FusionPass, use_all_reduce
from fusion_vllm import kept

logger = init_logger("vllm.fusion_core")

KEY = "post_grad_custom_post_pass"
"""Where vLLM's configuration has a user's pass."""


class VllmFusion(InductorPass):  # type: ignore[misc]
    """The fusion pass, whose ranks agree before any cache is asked.

    vLLM hashes ``uuid`` into the keys of all its caches, so that every rank calls it before one of them finds its graph
    in a cache and compiles nothing. The ranks of the tensor- and expert-parallel groups agree there.

    Args:
        config: Which backends may run, and how; None for the defaults of each process's environment.
    """

    def __init__(self, config: FusionConfig | None = None) -> None:
        self.config = config
        self._alone: FusionPass | None = None
        self._agreed: dict[tuple[str, ...], FusionPass] = {}
        self._vllm_config: Any = None

    def _own(self) -> FusionPass:
        if self._alone is None:
            self._alone = FusionPass(self.config)
        groups = _parallel_groups()
        names = tuple(groups)
        if not names:
            return self._alone
        if names not in self._agreed:
            for name, coordinator in groups.items():
                use_all_reduce(name, _all_reduce(coordinator.unique_name))
            self._agreed = {names: self._alone.among(*names)}
        return self._agreed[names]

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite one graph, log a line, and keep the report beside vLLM's cache."""
        self._own()(graph)
        report = fusion_core.last_report()
        if report is None or not report.sites:
            return
        logger.info("%s, for %s", str(report).partition("\n")[0], _sizes())
        if self._vllm_config is not None:
            kept.save(report, self._vllm_config)

    def keep_reports_for(self, vllm_config: Any) -> None:
        """Keep the reports of graphs from now on beside the cache of this configuration."""
        self._vllm_config = vllm_config

    def uuid(self) -> str:
        """A key of everything that the pass's work depends on; one that occurs once if that is not known yet."""
        return self._own().uuid()

    def __deepcopy__(self, memo: dict[int, Any]) -> VllmFusion:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return VllmFusion, (self.config,)


def _parallel_groups() -> dict[str, Any]:
    """Torch's name of each group in which this process's model reduces → vLLM's coordinator of it."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    found: dict[str, Any] = {}
    for name in ("_TP", "_EP"):
        coordinator = getattr(state, name, None)
        if coordinator is None or coordinator.world_size < 2 or not dist.is_initialized():
            continue
        found.setdefault(str(coordinator.device_group.group_name), coordinator)
    return found


def _all_reduce(vllm_name: str) -> Any:
    """VLLM's choice of an all_reduce for a group: what a site runs where its kernel does not."""

    def all_reduce(x: Tensor) -> Tensor:
        reduced: Tensor = torch.ops.vllm.all_reduce(x, group_name=vllm_name)
        return reduced

    return all_reduce


def _sizes() -> str:
    """The token counts that the graph is compiled for."""
    from vllm.compilation.passes import inductor_pass

    context = inductor_pass._pass_context
    if context is None:
        return "any number of tokens"
    sizes = context.compile_range
    return f"{sizes.start} tokens" if sizes.is_single_size() else f"{sizes.start} to {sizes.end} tokens"
