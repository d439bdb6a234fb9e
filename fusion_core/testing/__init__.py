"""What a backend's author tests with: generators of sites and tensors, a pool of workers, and the conformance kit.

Needs the extra ``testing`` (``pip install 'fusion-core[testing]'``). A backend's own test file is two lines::

    from fusion_core.testing.conformance import *  # noqa: F403
    BACKEND = "acme"
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_core.testing.checks import CHECKS, Check, CheckFailed, CheckNotApplicable, CheckSkipped
    from fusion_core.testing.drawing import draw_site, draw_tensors
    from fusion_core.testing.requirement_sides import NoSides, Sides, sides
    from fusion_core.testing.sites import Impossible, example_site, repaired
    from fusion_core.testing.subject import Subject, subjects
    from fusion_core.testing.tensors import Values, build_tensors
    from fusion_core.testing.tolerance import Excess, excess
    from fusion_core.workers import WorkerError, WorkerPool

# Imported when first used: worker processes import parts of this package, and need neither hypothesis nor pytest.
_HOMES = {
    "checks": ("CHECKS", "Check", "CheckFailed", "CheckNotApplicable", "CheckSkipped"),
    "drawing": ("draw_site", "draw_tensors"),
    "requirement_sides": ("NoSides", "Sides", "sides"),
    "sites": ("Impossible", "example_site", "repaired"),
    "subject": ("Subject", "subjects"),
    "tensors": ("Values", "build_tensors"),
    "tolerance": ("Excess", "excess"),
}
_MODULES = {name: f"fusion_core.testing.{module}" for module, names in _HOMES.items() for name in names}
_MODULES |= {"WorkerError": "fusion_core.workers", "WorkerPool": "fusion_core.workers"}

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
