"""``torch.compile(model, backend="fusion_core")``: Inductor with the fusion pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fusion_core._torch import inductor
from fusion_core.agree.graph_groups import mentioned
from fusion_core.config import FusionConfig
from fusion_core.fusion_pass import FusionPass
from fusion_core.report import cache as report_cache
from fusion_core.report import history
from fusion_core.report.report import Report


@functools.lru_cache(maxsize=64)
def _pass_for(config: FusionConfig) -> FusionPass:
    return FusionPass(config)


class Backend:
    """A backend for ``torch.compile``: Inductor with the user's mode and options, then the fusion pass.

    Args:
        config: Which backends of fusion_core may run, and how; None to read the defaults at each compilation.
    """

    __name__ = "fusion_core"

    def __init__(self, config: FusionConfig | None = None) -> None:
        self.config = config

    def __call__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        """Compile one graph that Dynamo captured."""
        # On every rank, before the compile cache is read: a rank that finds its graph there never runs the pass.
        groups = mentioned(graph_module, inputs)
        own = _pass_for(FusionConfig() if self.config is None else self.config).among(*groups)
        patches = inductor.with_pass(own, inductor.mode_options(mode, options))
        compiled_now: set[str] = set()

        def keep(report: Report) -> None:
            # Saved by the pass, before Inductor stores the graph: another rank may load it as soon as it is stored.
            compiled_now.add(report_cache.save(report))

        with history.collecting(keep), inductor.taking() as taken:
            compiled = inductor.compile_graph(graph_module, inputs, patches)
        if taken.hits > 0:
            names = [name for name in taken.labels if name not in compiled_now]
            kept = [report for name in names if (report := report_cache.load(name)) is not None]
            for report in kept or [Report(sites=())]:
                history.record(dataclasses.replace(report, origin="cache"), own.config.reports)
        return compiled

    def reset(self) -> None:
        """Called by ``torch._dynamo.reset``."""
        inductor.reset_cudagraphs()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Backend) and self.config == other.config

    def __hash__(self) -> int:
        return hash((Backend, self.config))


fusion_core = Backend()
"""The backend that torch finds under the name ``"fusion_core"``."""


def compile(model: Callable[..., Any], config: FusionConfig | None = None, **torch_compile_kwargs: Any) -> Any:
    """``torch.compile`` with fusion.

    Args:
        model: A module or function.
        config: Which backends may run, and how.
        **torch_compile_kwargs: Arguments of ``torch.compile``, except ``backend``.

    Returns:
        What ``torch.compile`` returns.

    Raises:
        TypeError: for ``backend=``.
        BackendError: if ``config.order`` names a backend that does not load, if ``config.options`` names an option that
            no backend has, or if any backend does not load under ``config.strict``.
    """
    if "backend" in torch_compile_kwargs:
        raise TypeError(
            "fusion_core.compile got backend=, needs none: it compiles by Inductor; torch.compile takes others"
        )
    if config is not None:
        _pass_for(config)  # a backend that does not load is then an error here, not during the first call
    return torch.compile(model, backend=Backend(config), **torch_compile_kwargs)
