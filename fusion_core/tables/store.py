"""Where tables are kept: the user's own in the cache directory, those of known machines in the package."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from fusion_core._files import write_whole
from fusion_core.errors import ConfigError
from fusion_core.reason import Reason
from fusion_core.site import Device
from fusion_core.tables.machine import HINT, Machine, refusal
from fusion_core.tables.table import Table, TableError

NONE = "none"
"""The setting for no table at all."""

CACHE_NEEDS = "a cache directory that can be written; set XDG_CACHE_HOME to one"

LARGEST_FILE = 16 * 2**20
"""Bytes; a table of a thousand points has less than a hundredth of it."""


@dataclass(frozen=True)
class Found:
    """The table to use, if there is one.

    Attributes:
        table: None where nothing was measured that holds here.
        origin: The table's file, or ``"<name> of fusion-core"`` for one that came with the package; empty without one.
        problems: Files that were looked at and cannot be used, and why. That there is none is no problem.
    """

    table: Table | None
    origin: str = ""
    problems: tuple[Reason, ...] = ()


def find(device: Device, world_size: int, setting: str | None = None) -> Found:
    """The table that holds for a process group of ``world_size`` ranks on ``device``; it never raises.

    Args:
        device: Where the model runs.
        world_size: The number of ranks in the process group.
        setting: None for the user's own table, and where there is none that holds, the one of the package. A path for
            that file alone. ``"none"`` for no table.
    """
    if setting == NONE:
        return Found(None)
    here = Machine.here(world_size, device)
    path = path_for(here) if setting is None else Path(os.path.expanduser(setting))
    return _find(here, str(path), _stamp(path), setting is not None)


def save(table: Table) -> Path:
    """Keep a table as the user's own for its machine; the file that now holds it.

    Raises:
        ConfigError: where it cannot be written.
    """
    path = path_for(table.machine)
    if not path.is_absolute():
        raise ConfigError(f"the table would be written to {path}, needs {CACHE_NEEDS}")
    try:
        write_whole(path, to_json(table))
    except OSError as error:
        raise ConfigError(f"the table cannot be written to {path} ({error}), needs {CACHE_NEEDS}") from error
    return path


def path_for(machine: Machine) -> Path:
    """The file of the user's own table for a machine; ``~/.cache/fusion_core/tables/nvidia-h200-x2.json``, say."""
    return folder() / f"{_slug(machine)}.json"


def folder() -> Path:
    """Where the user's own tables are."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"))
    return cache / "fusion_core" / "tables"


def to_json(table: Table) -> str:
    """The text of a table's file: a line for each row, so that two tables can be compared line by line."""
    document = table.to_dict()
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document.pop("rows"))
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    return "{\n" + ",\n".join([*lines, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        TableError: where there is none, or it is no table; names the file.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise TableError(f"{path} is not a file, needs a table; {HINT}")
            if status.st_size > LARGEST_FILE:
                raise TableError(f"{path} has {status.st_size} bytes, needs a table of at most {LARGEST_FILE}")
            data = file.read(LARGEST_FILE + 1)
    except FileNotFoundError as error:
        raise TableError(f"{path} does not exist, needs a table; {HINT}") from error
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        raise TableError(f"{path} cannot be read ({error}), needs a table; {HINT}") from error
    return _parsed(data, str(path))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # or a pipe would wait for its other end


def _parsed(data: bytes, origin: str) -> Table:
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{origin} is not JSON in UTF-8 ({error}), needs a table; {HINT}") from error
    try:
        return Table.from_dict(document)
    except TableError as error:
        raise TableError(f"{origin}: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None where there is none, empty where that cannot be told."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError):
        return ()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


@functools.lru_cache(maxsize=64)
def _find(here: Machine, path: str, stamp: tuple[int, ...] | None, explicit: bool) -> Found:
    problems: list[Reason] = []
    if explicit or stamp is not None:
        try:
            table = read(Path(path))
        except TableError as error:
            problems.append(Reason("table", str(error)))
        else:
            if (reason := refusal(table.machine, here, shipped=False)) is None:
                return Found(table, path)
            problems.append(replace(reason, found=f"{path}: {reason.found}"))
    if not explicit:
        for file in _shipped(here):
            origin = f"{file.name} of fusion-core"
            try:
                table = _parsed(file.read_bytes(), origin)
            except TableError as error:
                problems.append(Reason("table", str(error)))
                continue
            # one for other links is not a problem: the next one may hold, and nobody asked for it
            if refusal(table.machine, here, shipped=True) is None:
                return Found(table, origin, tuple(problems))
    return Found(None, "", tuple(problems))


def _shipped(machine: Machine) -> Iterator[Traversable]:
    """The package's tables for this GPU and number of ranks: ``nvidia-h200-x2.json``, ``nvidia-h200-x2-pcie.json``."""
    wanted = re.compile(rf"{re.escape(_slug(machine))}(-.*)?\.json")
    return (file for file in _package_tables() if wanted.fullmatch(file.name))


def _package_tables() -> Sequence[Traversable]:
    folder = resources.files("fusion_core.tables") / "shipped"
    return sorted(folder.iterdir(), key=lambda file: file.name) if folder.is_dir() else []


def _slug(machine: Machine) -> str:
    name = re.sub("[^a-z0-9]+", "-", machine.gpu.lower()).strip("-") or "unnamed"
    return f"{name[:100]}-x{machine.world_size}"
