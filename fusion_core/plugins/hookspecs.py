"""The hooks that a backend may implement; all are optional."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from fusion_core.fallback import Status
    from fusion_core.lift.dialect import Dialect
    from fusion_core.patterns.definition import Pattern
    from fusion_core.plugins.strategy import Strategy
    from fusion_core.reason import Reason
    from fusion_core.report.report import Report
    from fusion_core.site import Device

hookspec = pluggy.HookspecMarker("fusion_core")
hookimpl = pluggy.HookimplMarker("fusion_core")
"""Marks a function of a plugin as the implementation of the hook of the same name."""


@hookspec
def fusion_strategies() -> Iterable[Strategy]:  # type: ignore[empty-body]
    """The strategies of this plugin. Declarations only: must not import the kernel library."""


@hookspec
def fusion_available(device: Device) -> Iterable[Reason]:  # type: ignore[empty-body]
    """The reasons why this backend cannot be used on ``device``, if any. Asked before any of its strategies."""


@hookspec
def fusion_patterns() -> Iterable[Pattern]:  # type: ignore[empty-body]
    """Patterns that this plugin adds to the library."""


@hookspec
def fusion_dialects() -> Iterable[Dialect]:  # type: ignore[empty-body]
    """Readings of another framework's operators in the neutral vocabulary."""


@hookspec
def fusion_report(report: Report) -> None:
    """Called once per compiled graph, after the pass has run."""


@hookspec
def fusion_status(device: Device) -> Iterable[Status]:  # type: ignore[empty-body]
    """The state that this backend keeps in this process. Called on demand, by ``fusion-core backends``."""
