"""What runs in a call of a place whose requirements have to be asked again then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusion_core.dispatch.path import Path
from fusion_core.plugins.asking import FAILED, answered
from fusion_core.plugins.requirements import Requirement
from fusion_core.run_time import fell_back
from fusion_core.site import Site
from fusion_core.site.run_time import of_data


class Preferences:
    """What may run from one token count on, in order of preference: the first of which a call meets what it asks.

    Args:
        paths: What may run, and the requirements that each call asks before it; the last asks nothing.
        form: What the site of a call is made of (`fusion_core.site.run_time`); None where no path asks anything.
        group: The process group's name.
    """

    def __init__(
        self, paths: Sequence[tuple[Path, tuple[Requirement, ...]]], form: list[Any] | None, group: str
    ) -> None:
        self._paths = paths
        self._form = form
        self._group = group
        self._found: dict[tuple[int, ...], Path] = {}

    def __call__(self, shape: tuple[int, ...]) -> Path:
        """What runs in a call with an x of this shape: every rank asks the same of the same, and finds the same."""
        first, asks = self._paths[0]
        if self._form is None or not asks:
            return first
        if shape not in self._found:
            site = of_data(self._form, shape, self._group)
            self._found[shape] = next(path for path, asks in self._paths if self._met(path, asks, site))
        return self._found[shape]

    def _met(self, path: Path, asks: Sequence[Requirement], site: Site) -> bool:
        """Whether a call meets what a path asks. One that cannot be asked is not met, and the report says so."""
        for requirement in asks:
            reason = answered(requirement, site)
            if reason is not None and reason.code == FAILED:
                assert path.strategy is not None
                found = f"asked of {site.inputs['x']}: {reason.found}"
                fell_back(path.strategy.name, self._group, replace(reason, found=found))
            if reason is not None:
                return False
        return True
