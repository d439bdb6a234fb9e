"""Dynamo's settings, and why it ends a graph. Dynamo is imported on first use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

_end: ContextVar[Any] = ContextVar("fusion_core_graph_end", default=None)


@contextmanager
def compiling(graph_module: Any) -> Iterator[None]:
    """Within this block, ``graph_module`` as captured by Dynamo is the graph being compiled."""
    token = _end.set(getattr(graph_module, "compile_subgraph_reason", None))  # Dynamo's reason for the end of the graph
    try:
        yield
    finally:
        _end.reset(token)


def graph_end() -> tuple[bool, str] | None:
    """Why the graph being compiled ends: whether at a graph break, and Dynamo's message; None if unknown."""
    why = _end.get()
    return None if why is None else (bool(why.graph_break), str(why.reason))


def uncompiled(model: Any) -> Any:
    """The original of a module or function that `torch.compile` has wrapped."""
    model = getattr(model, "_orig_mod", model)
    if getattr(model, "_torchdynamo_disable", False):  # by torch.compiler.disable, in a wrapper of the same kind
        return model
    return getattr(model, "_torchdynamo_orig_callable", model)


def settings(**changes: Any) -> AbstractContextManager[Any]:
    """Change settings of Dynamo within a block, by their names in its configuration."""
    import torch._dynamo.config

    return torch._dynamo.config.patch(**changes)  # type: ignore[no-any-return]


def without_limits() -> AbstractContextManager[Any]:
    """Capture every graph within a block. Beyond its limits, Dynamo silently runs a function eagerly."""
    return settings(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)


def cudagraph_skips() -> int:
    """The number of graphs in this process for which Inductor has skipped CUDA graphs."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])
