"""The example backend with memory that ranks share: its author needed public names alone, and it does what it shows."""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fusion_core
from tests.test_imports import PUBLIC

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "shared_memory_backend"
FILES = sorted(path for path in (ROOT / "examples").rglob("*.py"))


def not_public(source: str) -> Iterator[str]:
    """What a file imports of fusion_core that nothing promises to keep."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
            yield from (name for name in names if name.startswith("fusion_core.") and name not in PUBLIC)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fusion_core":
            if node.module != "fusion_core" and node.module not in PUBLIC:
                yield str(node.module)
                continue
            module = importlib.import_module(str(node.module))
            known = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
            yield from (f"{node.module}.{each.name}" for each in node.names if each.name not in (*known, "*"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "examples")))
def test_examples_import_public_names_alone(path):
    assert list(not_public(path.read_text(encoding="utf-8"))) == []


def test_the_example_uses_the_helper_and_declares_by_public_names():
    text = (EXAMPLE / "fusion_shm" / "workspaces.py").read_text(encoding="utf-8")
    assert "from fusion_core.workspaces import Call, Exchange, Provider, Workspace, Workspaces" in text
    assert set(fusion_core.workspaces.__all__) >= {"Call", "Exchange", "Provider", "Workspace", "Workspaces"}


def test_a_private_import_is_found():
    assert list(not_public("from fusion_core.agree.agreement import Agreement")) == ["fusion_core.agree.agreement"]
    assert list(not_public("from fusion_core.workspaces import Call, resolve")) == ["fusion_core.workspaces.resolve"]
    assert list(not_public("import fusion_core.workspaces.state")) == ["fusion_core.workspaces.state"]
    assert list(not_public("from fusion_core import groups")) == ["fusion_core.groups"]


@pytest.mark.nightly  # `make example-test` runs the same tests, with the example installed
def test_its_program_prints_what_the_page_shows(tmp_path):
    """As if it were installed: with the file that pip writes for an entry point."""
    info = tmp_path / "fusion_shm-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fusion-shm\nVersion: 0.1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[fusion_core.backends]\nshm = fusion_shm\n", encoding="utf-8")
    (info / "RECORD").write_text("", encoding="utf-8")
    folders = [str(tmp_path), str(EXAMPLE), os.environ.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_shm.py"],
        cwd=EXAMPLE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
