"""Reports beside Inductor's cache: a graph that comes from there never runs the pass, and still has a report.

The file of a report is named by its content, and the graph is stored with that name. So a graph has the report of the
compilation that it comes from, whatever Inductor's key is made of, and a file of any other content is none.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from fusion_core import _inductor
from fusion_core._files import write_whole
from fusion_core.report.report import Report


def save(report: Report) -> str:
    """Keep the report of the graph that is compiled now; its name.

    Where it cannot be written, a later process lacks it, no more.
    """
    text = json.dumps(report.to_dict(), default=str)
    name = hashlib.sha256(text.encode()).hexdigest()
    if _inductor.caches_enabled():
        _inductor.label(name)
        with suppress(OSError):
            write_whole(_path(name), text)
    return name


def load(name: str) -> Report | None:
    """The report of this name; None where it is not kept any more."""
    path = _path(name)
    try:
        content = path.read_bytes() if path.is_file() else b""  # a pipe in its place would be waited for
    except OSError:
        return None
    return Report.from_dict(json.loads(content)) if hashlib.sha256(content).hexdigest() == name else None


def _path(name: str) -> Path:
    return _inductor.cache_dir() / "fusion_core" / f"{name}.json"
