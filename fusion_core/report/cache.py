"""Reports saved next to Inductor's cache, for graphs that come from the cache and never run the pass.

The name of a report's file is the hash of its content, and the graph is stored with that name. So a graph has the
report of its own compilation, whatever Inductor's key consists of, and a file with other content is ignored.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from fusion_core._files import write_whole
from fusion_core._torch import inductor
from fusion_core.report.report import Report


def save(report: Report) -> str:
    """Save the report of the graph that is being compiled. Returns its name.

    If it cannot be written, later processes have no report of this graph.
    """
    text = json.dumps(report.to_dict(), default=str)
    name = hashlib.sha256(text.encode()).hexdigest()
    if inductor.caches_enabled():
        inductor.label(name)
        with suppress(OSError):
            write_whole(_path(name), text)
    return name


def load(name: str) -> Report | None:
    """The report of this name, or None if the file is missing or damaged."""
    path = _path(name)
    try:
        content = path.read_bytes() if path.is_file() else b""  # reading a pipe would block
    except OSError:
        return None
    return Report.from_dict(json.loads(content)) if hashlib.sha256(content).hexdigest() == name else None


def _path(name: str) -> Path:
    return inductor.cache_dir() / "fusion_core" / f"{name}.json"
