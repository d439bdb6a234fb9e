"""What a cached graph hangs on changes, or what was kept of it is damaged: nothing stale runs, nothing stale is said."""

from __future__ import annotations

import functools
import importlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion_core
from fusion_core import FusionConfig, dynamo, sources
from fusion_core.fingerprint import fingerprint
from fusion_core.sources import plugin_files
from fusion_core.workers import WorkerPool
from tests.faults.cache_jobs import KERNEL, LATE, TRACED, install, start
from tests.faults.fault import Fault
from tests.support.graphs import REFERENCE, registry
from tests.test_by_tokens import table
from tests.test_matching import tensors
from tests.test_report_cache import Drop, model, same_model

FIXTURES = ("tmp_path", "monkeypatch", "one_rank")
NOBODY = "cache, nobody kept what was decided"


def observe(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_rank: str, **given: Any) -> str:
    """One fact of the caches, in a process group of one."""
    return _FACTS[what](tmp_path, monkeypatch, **given)


# the files of a plugin

PROJECT = {
    "acme/__init__.py": "from acme import helper",
    "acme/helper.py": "ERROR = 3",
    "acme/deep/__init__.py": "",
    "acme/deep/inner.py": "ERROR = 3",
    "acme/table.json": "[3]",
    "acme/kernels.so": "\x7fELF 3",
    "acme_common.py": "ERROR = 3",
}
"""What a project of two top-level modules has in it."""


def _plugin(root: Path, form: str) -> tuple[str, Distribution | None]:
    """A project that is installed in one of the ways there are: its entry point's module, and its distribution."""
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
    """Whether the hash of a plugin's files is another one behind a change, and all files have one name each."""
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
    """Make what the distribution says of itself unreadable, and mend a helper."""
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
    """What a plugin's distribution asks for has another version."""
    using = registry(REFERENCE)
    keys = set()
    for version in ("1.0", "1.1"):
        monkeypatch.setattr(type(using.backends["reference"]), "libraries", {"acme-kernels": version})
        keys.add(fingerprint(using))
    return f"right: {'another key' if len(keys) == 2 else 'the same key'}"


# what was kept of a graph


@functools.cache
def _compiled() -> tuple[Path, str]:
    """A cache of Inductor's with `model` in it, and when that was compiled."""
    folder = Path(tempfile.mkdtemp(prefix="fusion_core_faults_"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        assert _run() == "compiled, 1 site"
    report = fusion_core.last_report()
    assert report is not None
    return folder, report.compiled_at


def _run(function: Callable[..., Any] = model, config: FusionConfig | None = None, **options: Any) -> str:
    """Compile and compare the numbers; where the graph came from, and what its report has."""
    torch._dynamo.reset()
    given = tensors()
    with torch.no_grad():
        found = fusion_core.compile(function, config, options=options)(*given)
        dropped = any(isinstance(value, Drop) for value in options.values())
        torch.testing.assert_close(found, function(*given), rtol=0.02, atol=0.02)
    report = fusion_core.last_report()
    assert report is not None
    assert dropped or report.sites or report.origin == "cache"
    if "nobody kept" in str(report):
        return NOBODY
    fused = len(report.fused)
    said = f"{fused} site" + ("" if fused == 1 else "s")
    return f"{report.origin}, {said}"


def _cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cache; the folder of reports in it."""
    shutil.copytree(_compiled()[0], tmp_path / "cache")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fusion_core"


def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]) -> str:
    """The graph comes from the cache, and the file of its report is damaged."""
    (file,) = _cached(tmp_path, monkeypatch).iterdir()
    damage(file)
    return f"right: {_run()}"


def _replaced(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def _edited(**change: Any) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | change))


def _instead(make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda file: (file.unlink(), make(file))


def _no_folder(file: Path) -> None:
    shutil.rmtree(file.parent)
    file.parent.write_text("")


def _changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **change: Any) -> str:
    """A compilation with a change, between two without."""
    _cached(tmp_path, monkeypatch)
    between = _run(**change)
    assert _run() == "cache, 1 site"
    assert fusion_core.last_report().compiled_at == _compiled()[1]
    assert _run(**change) == between.replace("compiled", "cache")
    return f"right: {between}"


def _table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tuning table is another one, under the same path."""
    _cached(tmp_path, monkeypatch)
    found = []
    for us in (5.0, 50.0, 5.0):
        path = table(tmp_path, (2, {"unfused": 10.0, "acme.few": us}))
        dynamo._pass_for.cache_clear()  # as in another process
        found.append(_run(config=FusionConfig(table=path)))
    return f"right: {'; '.join(found)}"


def _full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Reports cannot be written."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "fusion_core").write_text("")
    return f"right: {_run()}; then {_run()}"


def _warm(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    ranks: int = 1,
    change: Callable[[Path], object] = _nothing,
) -> str:
    """Two starts of a process that share a cache, and a change between them."""
    install(tmp_path, kernel)
    starts = []
    for step in (_nothing, change):
        step(tmp_path)
        with WorkerPool(ranks, timeout=300.0) as pool:
            found = pool.run(start, str(tmp_path), str(tmp_path / "cache"))
        assert len({each[1:] for each in found}) == 1, found
        origins = sorted({each[0] for each in found}, reverse=True)  # one rank may find what another has just kept
        starts.append(f"{origins[0]} {found[0][2]} {found[0][1]:g}")
    return f"right: {'; '.join(starts)}"


_FACTS: dict[str, Callable[..., str]] = {
    "sources": _sources,
    "archive": _archive,
    "libraries": _libraries,
    "kept": _kept,
    "changed": _changed,
    "table": _table,
    "full": _full,
    "warm": _warm,
}


def _row(name: str, fault: str, expected: str, *, slow: bool = False, **given: Any) -> Fault:
    return Fault("caches", name, fault, f"right: {expected}", given, slow)


def _of_plugin(
    form: str, name: str, fault: str, change: Callable[[Path], object], expected: str = "another key"
) -> Fault:
    return _row(f"{form}: {name}", fault, expected, what="sources", form=form, change=change)


def _of_report(name: str, fault: str, damage: Callable[[Path], object], expected: str = NOBODY) -> Fault:
    return _row(f"report: {name}", fault, expected, what="kept", damage=damage)


def _between(name: str, fault: str, expected: str, *, slow: bool = False, **change: Any) -> Fault:
    return _row(f"graph: {name}", fault, expected, slow=slow, what="changed", **change)


SOURCES = (
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
    _of_plugin("editable", "a link to itself", "a link leads to itself", _link("acme/again.py", "acme/again.py")),
    _of_plugin("editable", "a link to its folder", "a link leads to the package that it is in", _link("acme/deep/again", "acme"), "the same key"),
    _of_plugin("editable", "a folder for a module", "a folder stands in a module's place", _folder("acme/helper.py")),
    _of_plugin("installed", "a folder for a module", "a folder stands in a module's place", _folder("acme/helper.py")),
    _of_plugin("editable", "a name that is no text", "a file's name cannot be decoded", _undecodable),
    _of_plugin("installed", "RECORD is broken", "the list of files cannot be read", _record),
    _row("an archive", "a module in an archive is mended", "another key", what="archive"),
    _row("a library", "the library that a plugin asks for has another version", "another key", what="libraries"),
)  # fmt: skip

KEPT = (
    _of_report("whole", "nothing", _nothing, "cache, 1 site"),
    _of_report("gone", "it is deleted", Path.unlink),
    _of_report("empty", "it is empty", _replaced(b"")),
    _of_report("cut", "it ends half-way", lambda file: file.write_bytes(file.read_bytes()[:200])),
    _of_report("no JSON", "it is something else", _replaced(b"\x00\xff\xfe")),
    _of_report("a list", "it is a list", _replaced(b"[]")),
    _of_report("a number", "it is a number", _replaced(b"7")),
    _of_report("a list of numbers", "it is a list of numbers", _replaced(b"[7]")),
    _of_report("depth", "it is a very deep list", _replaced(b"[" * 100_000)),
    _of_report("another schema", "another release wrote it", _edited(schema=1)),
    _of_report("sites of another shape", "its sites are numbers", _edited(sites=[7])),
    _of_report("no sites", "its sites are a text", _edited(sites="none")),
    _of_report("a device that is a number", "a field has another type", _edited(device=7)),
    _of_report("another report", "it is whole, and of another graph", _edited(sites=[])),
    _of_report("a pipe", "a pipe stands in its place", _instead(os.mkfifo)),
    _of_report("a folder", "a folder stands in its place", _instead(Path.mkdir)),
    _of_report("a link to itself", "a link stands in its place", _instead(lambda file: file.symlink_to(file))),
    _of_report("an endless file", "a link to a device stands in its place", _instead(lambda file: file.symlink_to("/dev/zero"))),
    _of_report("no folder", "a file stands in the folder's place", _no_folder),
    _row("report: not written", "a file stands in the folder's place when it is written", f"compiled, 1 site; then {NOBODY}", what="full"),
)  # fmt: skip

GRAPHS = (
    _between("other names of arguments", "the same code with other names", "cache, 1 site", function=same_model),
    _between("an option of Inductor", "an option differs", "compiled, 1 site", epilogue_fusion=False),
    _between("a pass before", "the user has a pass before", "compiled, 0 sites", post_grad_custom_pre_pass=Drop()),
    _between("a pass behind", "the user has a pass of the same place", "compiled, 0 sites", post_grad_custom_post_pass=Drop()),
    _between("a limit", "the configuration differs", "compiled, 0 sites", config=FusionConfig(limit=0)),
    _between("an order", "the order differs", "compiled, 0 sites", slow=True, config=FusionConfig(order=())),
    _between("numerics", "numerics differ", "compiled, 1 site", slow=True, config=FusionConfig(numerics="deterministic")),
    _between("reports kept", "the number of reports differs, on which no graph hangs", "cache, 1 site", slow=True, config=FusionConfig(reports=7)),
    _row("graph: a table", "the tuning table is measured anew", "compiled, 1 site; compiled, 1 site; cache, 1 site", slow=True, what="table"),
)  # fmt: skip

STARTS = (
    _row("start: nothing changes", "a process finds the graph of an earlier one", "compiled acme.fused 3; cache acme.fused 3", slow=True, what="warm", kernel=KERNEL),
    _row("start: a helper is mended", "a constant that the graph holds is mended", "compiled acme.fused 3; compiled acme.fused 7", slow=True, what="warm", kernel=TRACED, change=_write("acme/helper.py")),
    _row("start: an operator that is registered late", "its module is imported when the strategy is traced", "compiled acme.fused 3; cache acme.fused 3", slow=True, what="warm", kernel=LATE),
    _row("start: a kernel of two ranks", "the graph holds an operator of fusion_core", "compiled acme.fused 3; cache acme.fused 3", slow=True, what="warm", kernel=KERNEL, ranks=2),
    _row("start: a late operator of two ranks", "its module is imported when the kernel runs", "compiled acme.fused 3; cache acme.fused 3", slow=True, what="warm", kernel=LATE, ranks=2),
    _row("start: a mended helper of two ranks", "a helper is mended", "compiled acme.fused 3; compiled acme.fused 7", slow=True, what="warm", kernel=KERNEL, ranks=2, change=_write("acme/helper.py")),
)  # fmt: skip

ROWS = (*SOURCES, *KEPT, *GRAPHS, *STARTS)
