"""Reports beside Inductor's cache: a graph that comes from there never runs the pass, and still has a report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fusion_core import _inductor
from fusion_core.fusion_pass import FusionPass
from fusion_core.report import Report, write_whole


class GraphKey:
    """Names one graph that Dynamo captured, with its inputs and our pass: the same in every process."""

    def __init__(self, graph_module: fx.GraphModule, inputs: Sequence[Any], own: FusionPass) -> None:
        # the compiler takes the graph module over and may change it, so that its text is taken now
        self._graph = str(graph_module.graph)
        self._inputs = [_describe(value) for value in inputs]
        self._grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._own = own

    @cached_property
    def path(self) -> Path:
        """The file that holds the reports."""
        parts = (self._graph, self._inputs, self._grad, self._own.uuid())
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()
        return _inductor.cache_dir() / "fusion_core" / f"{digest}.json"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}{value.device}{value.requires_grad}"
    return repr(value)


def save(key: GraphKey, reports: Sequence[Report]) -> None:
    """Keep the reports of one compilation; where they cannot be written, a later process lacks them, no more."""
    try:
        write_whole(key.path, json.dumps([report.to_dict() for report in reports]))
    except OSError:
        return


def load(key: GraphKey) -> list[Report]:
    """The reports that were kept for a graph; none where nothing was kept or another version wrote it."""
    try:
        return [Report.from_dict(item) for item in json.loads(key.path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):
        return []
