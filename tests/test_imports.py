"""What an import brings along: neither Inductor nor any vendor's library."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

import fusion_core
from fusion_core.plugins import sources


def modules_after(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"{statement}\nimport sys\nprint(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import fusion_core",
        "import fusion_core; fusion_core.Registry.load()",
        "import fusion_core; r = fusion_core.Registry.load(); [r.unavailable(b, fusion_core.Device.here()) for b in r.backends]",
    ],
    ids=["import", "list backends", "ask what can be used"],
)
def test_no_kernel_library_and_no_compiler_comes_along(statement: str) -> None:
    brought = modules_after(statement)
    assert "fusion_core" in brought
    assert brought.isdisjoint({"flashinfer", "aiter", "torch._inductor.compile_fx", "torch._dynamo", "triton"})
    assert "sympy" not in brought, "its import takes a third of the time of torch's"


def test_the_check_above_can_fail() -> None:
    assert "torch._inductor.compile_fx" in modules_after("import torch._inductor.compile_fx")


def test_every_public_name_is_there() -> None:
    assert fusion_core.__all__ == sorted(fusion_core.__all__)
    for name in fusion_core.__all__:
        assert getattr(fusion_core, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        fusion_core.fuse  # noqa: B018


PUBLIC = {
    "fusion_core.dynamo": ["fusion_core"],
    "fusion_core.ops": ["all_reduce_add_rms_norm"],
    "fusion_core.patterns": ["CORE_PATTERNS"],
    "fusion_core.patterns.plain": ["all_reduce"],
    "fusion_core.testing": ["example_site", "sides", "subjects"],
    "fusion_core.testing.conformance": ["CHECKS"],
    "fusion_core.vocabulary": ["add", "all_reduce", "operation", "rms_norm"],
    "fusion_core.workers": ["WorkerError", "WorkerPool"],
    "fusion_core.workspaces": ["Call", "Exchange", "Provider", "Workspace", "Workspaces", "register_operator"],
}
"""Module → names, besides those of `fusion_core` itself: what documentation, examples and entry points name."""


@pytest.mark.parametrize("module", PUBLIC)
def test_public_modules_stay_where_they_are(module: str) -> None:
    found = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert getattr(found, name) is not None


def test_every_folder_of_the_library_is_in_the_compile_cache_s_key(tmp_path: Path) -> None:
    """A graph of other code would be loaded in silence otherwise."""
    root = Path(fusion_core.__file__).parent
    copy = tmp_path / "fusion_core"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("__pycache__"))
    folders = [copy, *(folder for folder in copy.rglob("*") if folder.is_dir())]
    assert len(folders) > 15
    before = _key(copy)
    assert before == _key(root)
    for folder in folders:
        file = min(each for each in folder.iterdir() if each.is_file())
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert _key(copy) != before, f"{file} may change and the key stays"
        file.write_bytes(content)
    assert _key(copy) == before


def _key(package: Path) -> str:
    """The hash that `core_sources` gives for a library in this folder."""
    module = package / "plugins" / "sources.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "__file__", str(module))
        return sources.core_sources.__wrapped__()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports for types alone, and those inside functions, are imports too: who reads a module reads what it imports."""
    packages = ("fusion_core", "fusion_reference", "fusion_flashinfer", "fusion_aiter")
    imports = grimp.build_graph(*packages, cache_dir=None)
    edges = [
        (module, other) for module in imports.modules for other in imports.find_modules_directly_imported_by(module)
    ]
    assert len(edges) > 500
    circles = networkx.strongly_connected_components(networkx.DiGraph(edges))
    assert [sorted(circle) for circle in circles if len(circle) > 1] == []
