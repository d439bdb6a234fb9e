"""Test tools for authors of backends: generators of sites and tensors, a pool of workers, and the conformance kit.

Needs the extra ``testing`` (``pip install 'fusion-core[testing]'``). A backend's own test file is two lines::

    from fusion_core.testing.conformance import *  # noqa: F403
    BACKEND = "acme"
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_core.samples.requirement_sides import NoSides, Sides, sides
    from fusion_core.samples.sites import Impossible, example_site, repaired
    from fusion_core.samples.tensors import Values, build_tensors
    from fusion_core.testing.checks import CHECKS, Check, CheckFailed, CheckNotApplicable, CheckSkipped
    from fusion_core.testing.drawing import draw_site, draw_tensors
    from fusion_core.testing.subject import Subject, subjects
    from fusion_core.testing.tolerance import Excess, excess
    from fusion_core.workers import WorkerError, WorkerPool

# Imported when first used: worker processes import parts of this package and need neither hypothesis nor pytest.
_HOMES = {
    "samples.requirement_sides": ("NoSides", "Sides", "sides"),
    "samples.sites": ("Impossible", "example_site", "repaired"),
    "samples.tensors": ("Values", "build_tensors"),
    "testing.checks": ("CHECKS", "Check", "CheckFailed", "CheckNotApplicable", "CheckSkipped"),
    "testing.drawing": ("draw_site", "draw_tensors"),
    "testing.subject": ("Subject", "subjects"),
    "testing.tolerance": ("Excess", "excess"),
    "workers": ("WorkerError", "WorkerPool"),
}
_MODULES = {name: f"fusion_core.{module}" for module, names in _HOMES.items() for name in names}

__all__ = [
    "CHECKS",
    "Check",
    "CheckFailed",
    "CheckNotApplicable",
    "CheckSkipped",
    "Excess",
    "Impossible",
    "NoSides",
    "Sides",
    "Subject",
    "Values",
    "WorkerError",
    "WorkerPool",
    "build_tensors",
    "draw_site",
    "draw_tensors",
    "example_site",
    "excess",
    "repaired",
    "sides",
    "subjects",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fusion_core.testing' has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name in ("hypothesis", "pytest"):
            error.add_note(f"fusion_core.testing.{name} needs it: pip install 'fusion-core[testing]'")
        raise
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
