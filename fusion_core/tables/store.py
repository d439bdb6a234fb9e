"""Storage of tables: the user's own in the cache directory, those of known machines in the package."""

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

from fusion_core._files import write_whole
from fusion_core._json.values import parse
from fusion_core.errors import ConfigError
from fusion_core.reason import Reason
from fusion_core.site import Device
from fusion_core.tables.machine import HINT, Machine, refusal
from fusion_core.tables.table import Table, TableError

NONE = "none"
"""The setting for no table at all."""

CACHE_NEEDS = "a cache directory that can be written; set XDG_CACHE_HOME to one"

LARGEST_FILE = 16 * 2**20
"""In bytes; a table of a thousand points has less than a hundredth of this."""


@dataclass(frozen=True)
class Found:
    """The table to use, if there is one.

    Attributes:
        table: The table, or None if none is valid here.
        origin: The table's file, or ``"<name> of fusion-core"`` for one that came with the package; empty without one.
        problems: Reasons why existing files cannot be used. A missing file is not a problem.
    """

    table: Table | None
    origin: str = ""
    problems: tuple[Reason, ...] = ()


def find(device: Device, world_size: int, setting: str | None = None) -> Found:
    """The table that is valid for a process group of ``world_size`` ranks on ``device``; never raises.

    Args:
        device: The device that the model runs on.
        world_size: The number of ranks in the process group.
        setting: None for the user's own table or, if none is valid, the package's. A path for only that file.
            ``"none"`` for no table.
    """
    if setting == NONE:
        return Found(None)
    here = Machine.here(world_size, device)
    path = path_for(here) if setting is None else Path(os.path.expanduser(setting))
    return _find(here, str(path), _stamp(path), setting is not None)


def save(table: Table) -> Path:
    """Save a table as the user's own for its machine. Returns the file.

    Raises:
        ConfigError: It cannot be written.
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
    """The file of the user's own table for a machine, such as ``~/.cache/fusion_core/tables/nvidia-h200-x2.json``."""
    return folder() / f"{_slug(machine)}.json"


def folder() -> Path:
    """The folder of the user's own tables."""
    from platformdirs import user_cache_path  # some ms, when a table is first looked for

    try:
        cache = user_cache_path("fusion_core", appauthor=False)
    except RuntimeError:  # there is no home; `save` refuses a path that is not absolute
        cache = Path("~/.cache/fusion_core")
    return cache / "tables"


def to_json(table: Table) -> str:
    """The text of a table's file, with a line per row so that two tables can be compared by lines."""
    document = table.to_dict()
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document.pop("rows"))
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    return "{\n" + ",\n".join([*lines, f' "rows": [\n{rows}\n ]']) + "\n}\n"


def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        TableError: There is no file, or it is not a table; names the file.
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
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a pipe would wait for its other end


def _parsed(data: bytes, origin: str) -> Table:
    try:
        document = parse(data, strict=True)
    except ValueError as error:
        raise TableError(f"{origin} is not JSON in UTF-8 ({error}), needs a table; {HINT}") from error
    try:
        return Table.from_dict(document)
    except TableError as error:
        raise TableError(f"{origin}: {error}") from None


def _stamp(path: Path) -> tuple[int, ...] | None:
    """A value that changes when the file does; None if there is no file, empty if that is unknown."""
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
            # one for other links is not a problem: the next one may be valid, and the user did not ask for this one
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
