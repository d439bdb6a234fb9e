"""Merging is on, by itself or with a backend that takes no site."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_core import DType, Registry, Strategy
from tests.acme import acme, opaque
from tests.corpus.case import ADD
from tests.support.graphs import registry


@pytest.fixture(autouse=True)
def _merging(_no_settings_from_outside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_CORE_MERGE", "1")


@pytest.fixture
def merging_alone(monkeypatch: Any) -> Registry:
    """A backend that takes no site: what changes is merged."""
    refusing = Strategy(ADD, "acme.add", opaque, requires=(DType("x", torch.complex64),), outputs=("normed",))
    return registry(acme(monkeypatch, refusing))
