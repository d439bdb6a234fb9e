"""The sources of a plugin: every file of its distribution, and the versions of what the distribution requires.

An installed distribution lists its files. An editable one lists a path file instead, which names folders: everything
that can be imported from there belongs to the distribution, and so do the modules in its ``top_level.txt``. The sources
of a plugin without a distribution are the package that contains its module.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import os
import sys
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from importlib.machinery import all_suffixes
from importlib.metadata import Distribution, PackageNotFoundError, requires
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OWN = "fusion-core"

_known: dict[tuple[str, str], str] = {}


def name_and_version(distribution: Distribution) -> tuple[str, str]:
    """A distribution's name and version; cached, since each of its properties parses its metadata anew."""
    if isinstance(distribution, Hashable):  # an importer's own class need not be
        return _name_and_version(distribution)
    return _name_and_version.__wrapped__(distribution)


@functools.lru_cache(maxsize=256)
def _name_and_version(distribution: Distribution) -> tuple[str, str]:
    metadata = distribution.metadata
    return metadata["Name"], metadata["Version"]


@functools.cache
def core_sources() -> str:
    """A hash of the library's own files."""
    return _hash(_tree(Path(__file__).parents[1], ""))


def plugin_sources(module: str, distribution: Distribution | None) -> str:
    """A hash of a plugin's files at the first call in this process: the code that is imported then is what runs.

    Args:
        module: The module that its entry point names.
        distribution: The distribution of its entry point; None if it has none.
    """
    key = module, "" if distribution is None else str(distribution.locate_file(""))
    if key not in _known:
        _known[key] = _hash(plugin_files(module, distribution))
    return _known[key]


def plugin_files(module: str, distribution: Distribution | None) -> dict[str, Path]:
    """The files of a plugin, by names that are the same on every machine."""
    if distribution is None or name_and_version(distribution)[0] == OWN:  # fusion_core's own files are in every key
        return _package(module)
    try:
        return _distributed(module, distribution)
    except (OSError, ValueError, csv.Error):  # the metadata of the distribution cannot be read
        return _package(module)


def _distributed(module: str, distribution: Distribution) -> dict[str, Path]:
    listed = _listed(distribution)
    if _file(module) in listed.values():  # without files that the plugin writes into its folder at run time
        return listed
    found = listed | _package(module)
    for folder in _path_folders(listed):
        for top in _tops(folder, module.partition(".")[0]):
            found |= _tree(top, top.name)
    for name in (distribution.read_text("top_level.txt") or "").split():
        found |= _package(name)
    return found


def libraries(distribution: str, name: str) -> dict[str, str | None]:
    """The versions of what a distribution and its extra ``name`` require; None for what is not installed.

    Args:
        distribution: Its name and version.
        name: The backend's name, which may also be that of an extra.
    """
    needed = {*_required(distribution.partition(" ")[0], name)} - {OWN, *_required(OWN, "")}
    return {name: _version(name) for name in sorted(needed)}


def _listed(distribution: Distribution) -> dict[str, Path]:
    """The files that a distribution lists among the installed modules, without its metadata."""
    found = {}
    for file in distribution.files or ():
        described = file.parts[0].endswith((".dist-info", ".egg-info"))
        if not described and ".." not in file.parts and "__pycache__" not in file.parts:
            found[file.as_posix()] = Path(str(distribution.locate_file(file)))
    return found


def _package(module: str) -> dict[str, Path]:
    """The files of the outermost package that contains a module, or of the module. Namespace packages do not count."""
    parts = module.split(".")
    for place in range(1, len(parts) + 1):
        file = _file(".".join(parts[:place]))
        if file is not None:
            name = "/".join(parts[:place])
            is_package = file.name.startswith("__init__.")
            return _tree(file.parent, name) if is_package else {name + "".join(file.suffixes): file}
    return {}


def _file(module: str) -> Path | None:
    """The file of a module, imported or not; None if it has none."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        try:
            spec = find_spec(module)
        except (ImportError, AttributeError, ValueError):  # no spec, or a parent that cannot be imported
            return None
        file = spec.origin if spec is not None and spec.has_location else None
    return None if file is None else Path(file)


def _tree(path: Path, name: str) -> dict[str, Path]:
    """A module's file, or all files in a package's folder and its subfolders."""
    found = {}
    seen = set()
    for here, folders, files in os.walk(path, followlinks=True):
        seen.add(os.path.realpath(here))
        inside = {each: os.path.realpath(os.path.join(here, each)) for each in folders if _is_content(each)}
        folders[:] = [each for each, real in inside.items() if real not in seen]  # a link may lead back
        for file in filter(_is_content, files):
            place = Path(here, file)
            found[Path(name, place.relative_to(path)).as_posix()] = place
    return found if path.is_dir() else {name: path}


def _is_content(name: str) -> bool:
    return name != "__pycache__" and not name.startswith(".")


def _path_folders(listed: dict[str, Path]) -> Iterator[Path]:
    """The folders that an editable installation adds to ``sys.path``."""
    for file in listed.values():
        if file.suffix == ".pth" and file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                folder = file.parent / line.strip()
                if not line.startswith(("#", "import ", "import\t")) and folder != file.parent and folder.is_dir():
                    yield folder


def _tops(folder: Path, namespace: str) -> Iterator[Path]:
    """The top-level importable entries of a folder: modules, packages, and its part of the plugin's namespace."""
    for entry in folder.iterdir():
        is_module = entry.name.endswith(tuple(all_suffixes()))
        if is_module or entry.name == namespace or (entry / "__init__.py").is_file():
            yield entry


def _hash(files: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(name.encode(errors="surrogateescape") + b"\0" + _content(file).encode() + b"\0")
    return digest.hexdigest()


def _content(file: Path) -> str:
    """A hash of a file's content; a word for what is not a file or cannot be read."""
    try:
        if not file.exists():  # in an archive
            file = next(parent for parent in file.parents if parent.exists())
        if not file.is_file():  # opening a pipe would block
            return "no file"
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return "not readable"


def _version(distribution: str) -> str | None:
    found = _metadata(version_of, distribution)
    return None if found is None else str(found)


def _required(distribution: str, extra: str) -> Iterator[str]:
    from packaging.requirements import (  # takes some 40 ms, only when the key is made
        InvalidRequirement,
        Requirement,
    )
    from packaging.utils import canonicalize_name

    lines = _metadata(requires, distribution) if distribution else None
    for line in lines or ():
        with suppress(InvalidRequirement):  # only old distributions have invalid ones
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                yield canonicalize_name(requirement.name)


def _metadata(ask: Callable[[str], Any], distribution: str) -> Any:
    try:
        return ask(distribution)
    except PackageNotFoundError:
        return None
