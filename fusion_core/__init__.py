"""Fused collectives for tensor-parallel inference in PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fusion_core.config import FusionConfig
from fusion_core.decision import Decision
from fusion_core.errors import BackendError, ConfigError, FusionError, PatternError, RanksDiffer
from fusion_core.fallback import Status, fell_back
from fusion_core.groups import AllReduce, process_group, use_all_reduce
from fusion_core.lift.dialect import Dialect, Reading, Refusal
from fusion_core.lift.operands import Check, Derived, Earlier, Only
from fusion_core.patterns.definition import Pattern, pattern
from fusion_core.plugins.hookspecs import hookimpl
from fusion_core.plugins.known_faster import KnownFaster
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.requirements import (
    Arch,
    Attribute,
    Contiguous,
    Dimensions,
    DType,
    DTypeAttribute,
    FixedTokens,
    LiveOutputs,
    MultipleOf,
    OnDevice,
    Present,
    Requirement,
    SameDType,
    SizeBetween,
    WorldSize,
)
from fusion_core.plugins.strategy import Strategy
from fusion_core.plugins.token_counts import Tokens
from fusion_core.plugins.variant import Variant
from fusion_core.reason import Reason, Stage
from fusion_core.report.history import last_report, reports
from fusion_core.report.report import Report, SiteReport
from fusion_core.site import Device, Site, TensorMeta

if TYPE_CHECKING:
    from fusion_core import ops
    from fusion_core.dry_run import explain
    from fusion_core.dynamo import compile
    from fusion_core.fusion_pass import FusionPass

# Imported when first used: they import Inductor, which takes longer than torch itself, and neither plugins nor a list
# of backends need it.
_LAZY = {"FusionPass": "fusion_pass", "compile": "dynamo", "explain": "dry_run"}

__all__ = [
    "AllReduce",
    "Arch",
    "Attribute",
    "BackendError",
    "Check",
    "ConfigError",
    "Contiguous",
    "DType",
    "DTypeAttribute",
    "Decision",
    "Derived",
    "Device",
    "Dialect",
    "Dimensions",
    "Earlier",
    "FixedTokens",
    "FusionConfig",
    "FusionError",
    "FusionPass",
    "KnownFaster",
    "LiveOutputs",
    "MultipleOf",
    "OnDevice",
    "Only",
    "Pattern",
    "PatternError",
    "Present",
    "RanksDiffer",
    "Reading",
    "Reason",
    "Refusal",
    "Registry",
    "Report",
    "Requirement",
    "SameDType",
    "Site",
    "SiteReport",
    "SizeBetween",
    "Stage",
    "Status",
    "Strategy",
    "TensorMeta",
    "Tokens",
    "Variant",
    "WorldSize",
    "compile",
    "explain",
    "fell_back",
    "hookimpl",
    "last_report",
    "ops",
    "pattern",
    "process_group",
    "reports",
    "use_all_reduce",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("fusion_core.ops")
    if name not in _LAZY:
        raise AttributeError(f"module 'fusion_core' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fusion_core.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return __all__
