"""The key of a compiled graph covers all of a plugin's files, in each way in which a plugin can be installed."""

from __future__ import annotations

import importlib
import os
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Any

import pytest

from fusion_core.plugins import sources
from fusion_core.plugins.fingerprint import fingerprint
from fusion_core.plugins.sources import plugin_files
from tests.faults.fault import Fault
from tests.support.graphs import REFERENCE, registry

FIXTURES = ("tmp_path", "monkeypatch")


def observe(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> str:
    """Whether the key changes after a change."""
    return _FACTS[what](tmp_path, monkeypatch, **given)


PROJECT = {
    "acme/__init__.py": "from acme import helper",
    "acme/helper.py": "ERROR = 3",
    "acme/deep/__init__.py": "",
    "acme/deep/inner.py": "ERROR = 3",
    "acme/table.json": "[3]",
    "acme/kernels.so": "\x7fELF 3",
    "acme_common.py": "ERROR = 3",
}
"""The files of a project of two top-level modules."""


def _plugin(root: Path, form: str) -> tuple[str, Distribution | None]:
    """Install a project in one of the possible ways; returns its entry point's module and its distribution."""
    site, project = root / "site", root / "project"
    module, where = "acme", site if form == "installed" else project
    files = dict(PROJECT)
    if form == "namespace":
        module, files = (
            "acme.plugin",
            {
                f"acme/plugin{name.removeprefix('acme')}": text
                for name, text in PROJECT.items()
                if name.startswith("acme/")
            },
        )
        files["acme/common/__init__.py"] = files["acme/common/helper.py"] = "ERROR = 3"
    for name, text in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text)
    info = site / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\nRequires-Dist: pluggy\n")
    listed = ["acme-1.0.dist-info/METADATA", "../bin/acme"]
    if form == "installed":
        listed += files
    elif form == "top_level.txt":
        (info / "top_level.txt").write_text("acme\nacme_common\n")
    else:
        (site / "_acme.pth").write_text(f"import os\n{project}\n")
        listed.append("_acme.pth")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in listed))
    sys.path.insert(0, str(where))
    return module, None if form == "package" else PathDistribution(info)


def _sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, change: Callable[[Path], object]) -> str:
    """Whether the hash of a plugin's files changes after a change; asserts that no file is named by its full path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sources, "_known", {})
    module, distribution = _plugin(tmp_path, form)
    importlib.invalidate_caches()
    before = sources.plugin_sources(module, distribution)
    change(tmp_path / ("site" if form == "installed" else "project"))
    assert sources.plugin_sources(module, distribution) == before, "what runs was imported before the change"
    sources._known.clear()
    after = sources.plugin_sources(module, distribution)
    assert not {name for name in plugin_files(module, distribution) if name.startswith("/")}
    return f"right: {'the same key' if after == before else 'another key'}"


def _write(name: str, text: str = "ERROR = 7") -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def _nothing(root: Path) -> None:
    pass


def _remove(name: str) -> Callable[[Path], object]:
    return lambda root: (root / name).unlink()


def _pipe(name: str) -> Callable[[Path], object]:
    return lambda root: os.mkfifo(root / name)


def _link(name: str, to: str) -> Callable[[Path], object]:
    return lambda root: (root / name).symlink_to(root / to)


def _folder(name: str) -> Callable[[Path], object]:
    return lambda root: ((root / name).unlink(), (root / name).mkdir())


def _undecodable(root: Path) -> None:
    (Path(os.fsdecode(os.fsencode(root) + b"/acme/\xff.py"))).write_text("")


def _record(root: Path) -> None:
    """Make the distribution's RECORD unreadable, and change a helper."""
    for record in (root.parent / "site").glob("*.dist-info/RECORD"):
        record.write_bytes(b"\xff\xfe\x00,")
    _write("acme/helper.py")(root)


def _archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plugin in an archive."""
    keys = []
    monkeypatch.setattr(sys, "path", [str(tmp_path / "acme.zip"), *sys.path])
    for text in ("ERROR = 3", "ERROR = 7"):
        with zipfile.ZipFile(tmp_path / "acme.zip", "w") as archive:
            archive.writestr("acme_zipped/__init__.py", "")
            archive.writestr("acme_zipped/helper.py", text)
        importlib.invalidate_caches()
        sys.path_importer_cache.pop(str(tmp_path / "acme.zip"), None)
        monkeypatch.setattr(sources, "_known", {})
        keys.append(sources.plugin_sources("acme_zipped", None))
    return f"right: {'another key' if len(set(keys)) == 2 else 'the same key'}"


def _libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A library that a plugin's distribution requires has another version."""
    using = registry(REFERENCE)
    keys = set()
    for version in ("1.0", "1.1"):
        monkeypatch.setattr(type(using.backends["reference"]), "libraries", {"acme-kernels": version})
        keys.add(fingerprint(using))
    return f"right: {'another key' if len(keys) == 2 else 'the same key'}"


_FACTS: dict[str, Callable[..., str]] = {"sources": _sources, "archive": _archive, "libraries": _libraries}


def _row(name: str, fault: str, expected: str, **given: Any) -> Fault:
    return Fault("plugin_files", name, fault, f"right: {expected}", given)


def _of_plugin(
    form: str, name: str, fault: str, change: Callable[[Path], object], expected: str = "another key"
) -> Fault:
    return _row(f"{form}: {name}", fault, expected, what="sources", form=form, change=change)


ROWS = (
    *(
        row
        for form in ("installed", "editable", "top_level.txt", "package")
        for row in (
            _of_plugin(form, "a helper", "a module beside the entry point's is mended", _write("acme/helper.py")),
            _of_plugin(form, "a submodule", "a module of a package inside is mended", _write("acme/deep/inner.py")),
            _of_plugin(form, "data", "a data file is another one", _write("acme/table.json", "[7]")),
            _of_plugin(form, "an extension", "a shared library is built anew", _write("acme/kernels.so", "\x7fELF 7")),
            _of_plugin(form, "a helper is gone", "a module is taken away", _remove("acme/helper.py")),
        )
    ),
    *(
        _of_plugin(form, "another top-level module", "a module beside the package is mended", _write("acme_common.py"))
        for form in ("installed", "editable", "top_level.txt")
    ),
    _of_plugin("package", "another distribution's module", "a module that is not the plugin's changes", _write("acme_common.py"), "the same key"),
    _of_plugin("namespace", "a helper", "a module of the plugin is mended", _write("acme/plugin/helper.py")),
    _of_plugin("namespace", "another package", "a package beside it in the namespace is mended", _write("acme/common/helper.py")),
    _of_plugin("editable", "a module more", "a module is added", _write("acme/more.py")),
    _of_plugin("editable", "nothing", "nothing changes", _nothing, "the same key"),
    _of_plugin("installed", "nothing", "nothing changes", _nothing, "the same key"),
    _of_plugin("installed", "what is made at run time", "the plugin writes beside its modules", _write("acme/made.so"), "the same key"),
    _of_plugin("editable", "a hidden file", "an editor leaves a file", _write("acme/.helper.py.swp"), "the same key"),
    _of_plugin("editable", "a pipe", "a pipe lies in the package", _pipe("acme/pipe.py")),
    _of_plugin("editable", "a file that cannot be read", "reading a file is an error", lambda root: (root / "acme/more.py").symlink_to("/proc/self/mem")),
    _of_plugin("editable", "a link to itself", "a link leads to itself", _link("acme/again.py", "acme/again.py")),
    _of_plugin("editable", "a link to its folder", "a link leads to the package that it is in", _link("acme/deep/again", "acme"), "the same key"),
    _of_plugin("editable", "a folder for a module", "a folder stands in a module's place", _folder("acme/helper.py")),
    _of_plugin("installed", "a folder for a module", "a folder stands in a module's place", _folder("acme/helper.py")),
    _of_plugin("editable", "a name that is no text", "a file's name cannot be decoded", _undecodable),
    _of_plugin("installed", "RECORD is broken", "the list of files cannot be read", _record),
    _row("an archive", "a module in an archive is mended", "another key", what="archive"),
    _row("a library", "the library that a plugin asks for has another version", "another key", what="libraries"),
)  # fmt: skip
