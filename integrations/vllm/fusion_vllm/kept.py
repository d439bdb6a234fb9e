"""Reports beside vLLM's cache: a process whose graphs come from there never runs the pass."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusion_core import Report
from fusion_vllm.equal_graphs import count_of

_written: set[Path] = set()
"""The folders to which this process has written."""
_paths: dict[int, tuple[Report, Path]] = {}
"""By a report's identity, where it is; the report itself is kept, so that no other one has it."""


def folder(vllm_config: Any) -> Path:
    """The folder of one rank's reports of one configuration. What vLLM hashes decides which graphs are the same."""
    from vllm import envs

    parallel = vllm_config.parallel_config
    rank = f"rank_{parallel.rank}_{parallel.data_parallel_index}"
    root = Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / "fusion_core"
    return root / str(vllm_config.compute_hash()) / rank


def save(report: Report, vllm_config: Any) -> None:
    """Keep the report of a graph that was compiled now. If it cannot be written, later processes do not have it."""
    with suppress(OSError):
        where = folder(vllm_config)
        if where not in _written:  # graphs of an older model's code
            _written.add(where)
            for old in where.glob("*.json"):
                old.unlink()
        where.mkdir(parents=True, exist_ok=True)
        _write(report, where, f"{len(list(where.glob('*.json'))):04}")


def count(report: Report) -> None:
    """Keep the new count of a report that was kept."""
    if (known := _paths.get(id(report))) is not None:
        with suppress(OSError):
            _, path = known
            _write(report, path.parent, path.stem.partition("-")[0])
            path.unlink()


def _write(report: Report, where: Path, number: str) -> None:
    text = json.dumps({"graphs": count_of(report), "report": report.to_dict()}, default=str)
    path = where / f"{number}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    temporary = where / f".{number}"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    _paths[id(report)] = report, path


def load(vllm_config: Any) -> list[tuple[dict[str, Any], int]]:
    """The reports of an earlier process with this configuration, in the order of their graphs, but for damaged ones.

    Each with the number of the model's graphs that are this one.
    """
    found = []
    for path in sorted(folder(vllm_config).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):  # of another release
            text = path.read_text(encoding="utf-8")
            if path.stem.endswith(hashlib.sha256(text.encode()).hexdigest()[:16]):
                data = json.loads(text)
                report = Report.from_dict(data["report"]).to_dict() | {"origin": "cache"}
                found.append((report, int(data["graphs"])))
    return found
