"""Plugins that are broken, each alone beside the reference backend."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

from fusion_core import FusionConfig, Registry
from tests.faults.fault import Fault
from tests.support.graphs import REFERENCE

FIXTURES = ("tmp_path", "monkeypatch")


def observe(source: str, tmp_path: Path, monkeypatch: object) -> str:
    """Load a plugin of this source; what the registry says of it."""
    (tmp_path / "broken_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)  # type: ignore[attr-defined]
    sys.modules.pop("broken_plugin", None)
    point = EntryPoint("broken", "broken_plugin", "fusion_core.backends")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        registry = Registry.of([REFERENCE, point], FusionConfig())
    assert "reference" in registry.backends
    failures = [str(failure.reason) for failure in registry.failures]
    assert len(warned) == len(failures)
    return f"refused: {'; '.join(failures)}" if failures else "right"


ROWS = (
    Fault(
        "plugins",
        "import: an error",
        "the module raises",
        "refused: RuntimeError: no",
        {"source": "raise RuntimeError('no')"},
    ),
)
