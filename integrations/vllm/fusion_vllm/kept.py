"""Reports beside vLLM's cache: a process whose graphs come from there never runs the pass."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from fusion_core import Report

_written: set[Path] = set()
"""The folders to which this process has written."""


def folder(vllm_config: Any) -> Path:
    """The folder of one rank's reports of one configuration. What vLLM hashes decides which graphs are the same."""
    from vllm import envs

    parallel = vllm_config.parallel_config
    rank = f"rank_{parallel.rank}_{parallel.data_parallel_index}"
    root = Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / "fusion_core"
    return root / str(vllm_config.compute_hash()) / rank


def save(report: Report, vllm_config: Any) -> None:
    """Keep the report of a graph that was compiled now. If it cannot be written, later processes do not have it."""
    text = json.dumps(report.to_dict(), default=str)
    with suppress(OSError):
        where = folder(vllm_config)
        if where not in _written:  # graphs of an older model's code
            _written.add(where)
            for old in where.glob("*.json"):
                old.unlink()
        where.mkdir(parents=True, exist_ok=True)
        number = len(list(where.glob("*.json")))
        temporary = where / f".{number}"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(where / f"{number:04}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json")


def load(vllm_config: Any) -> list[dict[str, Any]]:
    """The reports of an earlier process with this configuration, in the order of their graphs, but for damaged ones."""
    found = []
    for path in sorted(folder(vllm_config).glob("*.json")):
        with suppress(OSError, ValueError):
            text = path.read_text(encoding="utf-8")
            if path.stem.endswith(hashlib.sha256(text.encode()).hexdigest()[:16]):
                found.append(Report.from_dict(json.loads(text)).to_dict() | {"origin": "cache"})
    return found
