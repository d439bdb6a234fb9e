"""The choice of a path in a call, for sites whose requirements have to be asked at each call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusion_core.dispatch.path import ExecutionPath
from fusion_core.fallback import fell_back
from fusion_core.plugins.asking import FAILED, answered
from fusion_core.plugins.requirements import Requirement
from fusion_core.site import Site
from fusion_core.site.run_time import of_data


class Preferences:
    """The paths that may run from one token count on, best first. The first whose requirements are met runs.

    Args:
        paths: The paths, each with the requirements that a call asks before it; the last one has none.
        form: The data from which the site of a call is made (`fusion_core.site.run_time`); None if no path asks any.
        group: The process group's name.
    """

    def __init__(
        self, paths: Sequence[tuple[ExecutionPath, tuple[Requirement, ...]]], form: list[Any] | None, group: str
    ) -> None:
        self._paths = paths
        self._form = form
        self._group = group
        self._found: dict[tuple[int, ...], ExecutionPath] = {}

    def __call__(self, shape: tuple[int, ...]) -> ExecutionPath:
        """The path for an x of this shape. Every rank asks the same requirements about the same site: all agree."""
        first, asks = self._paths[0]
        if self._form is None or not asks:
            return first
        if shape not in self._found:
            site = of_data(self._form, shape, self._group)
            self._found[shape] = next(path for path, asks in self._paths if self._met(path, asks, site))
        return self._found[shape]

    def _met(self, path: ExecutionPath, asks: Sequence[Requirement], site: Site) -> bool:
        """Whether a call meets a path's requirements. One that raises is not met, and the report records it."""
        for requirement in asks:
            reason = answered(requirement, site)
            if reason is not None and reason.code == FAILED:
                assert path.strategy is not None
                found = f"asked of {site.inputs['x']}: {reason.found}"
                fell_back(path.strategy.name, self._group, replace(reason, found=found))
            if reason is not None:
                return False
        return True
