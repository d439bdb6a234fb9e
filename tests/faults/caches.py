"""What a cached graph depends on changes, or its report is damaged: no stale graph runs, no stale report is shown."""

from __future__ import annotations

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion_core
from fusion_core import FusionConfig, dynamo
from fusion_core.workers import WorkerPool
from tests.faults.cache_jobs import KERNEL, LATE, TRACED, install, start
from tests.faults.fault import Fault
from tests.test_matching import tensors
from tests.test_report_cache import Drop, model, same_model
from tests.token_counts import table

FIXTURES = ("tmp_path", "monkeypatch", "one_rank")
NOT_KEPT = "cache, its report was not kept"


def observe(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_rank: str, **given: Any) -> str:
    """One fact of the caches, in a process group of one."""
    return _FACTS[what](tmp_path, monkeypatch, **given)


def _write(name: str, text: str = "ERROR = 7") -> Callable[[Path], object]:
    return lambda root: (root / name).write_text(text)


def _nothing(root: Path) -> None:
    pass


@functools.cache
def _compiled() -> tuple[Path, str]:
    """An Inductor cache that contains `model`, and the time at which that was compiled."""
    folder = Path(tempfile.mkdtemp(prefix="fusion_core_faults_"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        assert _run() == "compiled, 1 site"
    report = fusion_core.last_report()
    assert report is not None
    return folder, report.compiled_at


def _run(function: Callable[..., Any] = model, config: FusionConfig | None = None, **options: Any) -> str:
    """Compile and compare the numbers; returns the graph's origin and its report's number of fused sites."""
    torch._dynamo.reset()
    given = tensors()
    with torch.no_grad():
        found = fusion_core.compile(function, config, options=options)(*given)
        dropped = any(isinstance(value, Drop) for value in options.values())
        torch.testing.assert_close(found, function(*given), rtol=0.02, atol=0.02)
    report = fusion_core.last_report()
    assert report is not None
    assert dropped or report.sites or report.origin == "cache"
    if "its report was not kept" in str(report):
        return NOT_KEPT
    fused = len(report.fused)
    said = f"{fused} site" + ("" if fused == 1 else "s")
    return f"{report.origin}, {said}"


def _cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a copy of the cache; returns the folder of reports in it."""
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
    """A compilation with a change, between two without it."""
    _cached(tmp_path, monkeypatch)
    between = _run(**change)
    assert _run() == "cache, 1 site"
    assert fusion_core.last_report().compiled_at == _compiled()[1]
    assert _run(**change) == between.replace("compiled", "cache")
    return f"right: {between}"


def _table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tuning table changes at the same path."""
    _cached(tmp_path, monkeypatch)
    found = []
    for us in (5.0, 50.0, 5.0):
        path = table(tmp_path, (2, {"unfused": 10.0, "acme.few": us}))
        dynamo._pass_for.cache_clear()  # as another process would have it
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
    """Two starts of a process with one cache, and a change between them."""
    install(tmp_path, kernel)
    starts = []
    for step in (_nothing, change):
        step(tmp_path)
        with WorkerPool(ranks, timeout=300.0) as pool:
            found = pool.run(start, str(tmp_path), str(tmp_path / "cache"))
        assert len({each[1:] for each in found}) == 1, found
        origins = sorted({each[0] for each in found}, reverse=True)  # one rank may find what another has just cached
        starts.append(f"{origins[0]} {found[0][2]} {found[0][1]:g}")
    return f"right: {'; '.join(starts)}"


_FACTS: dict[str, Callable[..., str]] = {
    "kept": _kept,
    "changed": _changed,
    "table": _table,
    "full": _full,
    "warm": _warm,
}


def _row(name: str, fault: str, expected: str, *, slow: bool = False, **given: Any) -> Fault:
    return Fault("caches", name, fault, f"right: {expected}", given, slow)


def _of_report(name: str, fault: str, damage: Callable[[Path], object], expected: str = NOT_KEPT) -> Fault:
    return _row(f"report: {name}", fault, expected, what="kept", damage=damage)


def _between(name: str, fault: str, expected: str, *, slow: bool = False, **change: Any) -> Fault:
    return _row(f"graph: {name}", fault, expected, slow=slow, what="changed", **change)


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
    _of_report("not readable", "reading it is an error", _instead(lambda file: file.symlink_to("/proc/self/mem"))),
    _of_report("an endless file", "a link to a device stands in its place", _instead(lambda file: file.symlink_to("/dev/zero"))),
    _of_report("no folder", "a file stands in the folder's place", _no_folder),
    _row("report: not written", "a file stands in the folder's place when it is written", f"compiled, 1 site; then {NOT_KEPT}", what="full"),
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

ROWS = (*KEPT, *GRAPHS, *STARTS)
