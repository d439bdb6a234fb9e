"""Fused collectives for tensor-parallel inference in PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_core import ops
    from fusion_core.config import FusionConfig
    from fusion_core.decide import Decision
    from fusion_core.dynamo import compile
    from fusion_core.errors import BackendError, ConfigError, FusionError, PatternError
    from fusion_core.dry_run import explain
    from fusion_core.fusion_pass import FusionPass
    from fusion_core.history import last_report, reports
    from fusion_core.hookspecs import hookimpl
    from fusion_core.lifting.dialect import Dialect, Reading
    from fusion_core.patterns.definition import Pattern, pattern
    from fusion_core.reason import Reason, Stage
    from fusion_core.registry import Registry
    from fusion_core.report import Report, SiteReport
    from fusion_core.requirements import (
        Arch,
        Attribute,
        Contiguous,
        Dimensions,
        DType,
        LiveOutputs,
        MultipleOf,
        OnDevice,
        Requirement,
        SameDType,
        SizeBetween,
        WorldSize,
    )
    from fusion_core.site import Device, Site, TensorMeta
    from fusion_core.strategy import Strategy

# Where each public name lives. They are imported when they are first used: the pass needs Inductor, which takes a
# second, and whoever only lists backends or writes a plugin does not.
_HOMES = {
    "config": ("FusionConfig",),
    "decide": ("Decision",),
    "dynamo": ("compile",),
    "errors": ("BackendError", "ConfigError", "FusionError", "PatternError"),
    "dry_run": ("explain",),
    "fusion_pass": ("FusionPass",),
    "history": ("last_report", "reports"),
    "hookspecs": ("hookimpl",),
    "lifting.dialect": ("Dialect", "Reading"),
    "patterns.definition": ("Pattern", "pattern"),
    "reason": ("Reason", "Stage"),
    "registry": ("Registry",),
    "report": ("Report", "SiteReport"),
    "requirements": (
        "Arch", "Attribute", "Contiguous", "Dimensions", "DType", "LiveOutputs", "MultipleOf", "OnDevice", "Requirement", "SameDType",
        "SizeBetween", "WorldSize",
    ),
    "site": ("Device", "Site", "TensorMeta"),
    "strategy": ("Strategy",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "ops"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("fusion_core.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'fusion_core' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fusion_core.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
