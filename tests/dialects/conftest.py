"""vLLM's process group in this process, and a backend that may run wherever a pattern stands."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from fusion_core import Registry, Strategy
from fusion_core.patterns import CORE_PATTERNS
from tests.dialects.vllm_groups import vllm_groups
from tests.support.graphs import plugin, registry


@pytest.fixture(scope="module")
def vllm(one_rank: str) -> Iterator[None]:
    with vllm_groups(tp_0=torch.distributed.group.WORLD) as coordinators:
        yield coordinators


@pytest.fixture
def own(monkeypatch: Any) -> Registry:
    """A registry with a backend whose strategies are the patterns' own functions."""
    strategies = [Strategy(pattern.name, f"own.{pattern.name}", pattern.function) for pattern in CORE_PATTERNS]
    point: EntryPoint = plugin(monkeypatch, "own", fusion_strategies=lambda: strategies)
    return registry(point)
