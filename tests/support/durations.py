"""The recorded duration of each test, which sets the mark `slow` and the order of the files.

``make durations`` records them in ``tests/durations.json``: seconds of each file, and of each slow test.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "durations.json"
SLOW = 5.0
"""The least seconds of a slow test, on two otherwise idle cores."""


@functools.cache
def _recorded() -> dict[str, dict[str, float]]:
    return json.loads(FILE.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def apply(items: list[pytest.Item]) -> None:
    """Mark slow tests, and put long files first: a long file at the end would leave the other core idle."""
    for item in items:
        if item.nodeid in _recorded()["slow"]:
            item.add_marker(pytest.mark.slow)
    files = _recorded()["files"]
    items.sort(key=lambda item: -files.get(_file(item.nodeid), 0.0))  # stable: a file stays whole


class Recorder:
    """Sums the durations that pytest or its workers report, and writes the file at the end."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for setup, call and teardown."""
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Replace all entries of the files that ran; keep those of other files that still exist."""
        files: defaultdict[str, float] = defaultdict(float)
        for nodeid, seconds in self.seconds.items():
            files[_file(nodeid)] += seconds
        slow = {nodeid: seconds for nodeid, seconds in self.seconds.items() if seconds >= SLOW}
        kept = {
            kind: {name: seconds for name, seconds in recorded.items() if _file(name) not in files and _exists(name)}
            for kind, recorded in _recorded().items()
        }
        data = {
            "files": {name: round(seconds, 1) for name, seconds in sorted((kept["files"] | files).items())},
            "slow": {name: round(seconds, 1) for name, seconds in sorted((kept["slow"] | slow).items())},
        }
        FILE.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _exists(nodeid: str) -> bool:
    return (FILE.parents[1] / _file(nodeid)).exists()
