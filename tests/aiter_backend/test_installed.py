"""Which of the things that may be importable as aiter is AMD's."""

import sys
from types import ModuleType

import pytest

from fusion_aiter.availability import unavailable
from fusion_aiter.source import NotAmds, installed
from tests.aiter_backend import releases
from tests.aiter_backend.on_disk import MI300X, codes, said

pytestmark = pytest.mark.usefixtures("machine")


def test_aiter_is_not_installed():
    assert installed() is None
    assert said() == [
        "aiter is not installed, needs AMD's AITER v0.1.19.post2 or later; "
        "AMD's images have it, or build it: https://github.com/ROCm/aiter#installation"
    ]


def test_the_unrelated_package_of_that_name(tmp_path):
    root = releases.write_unrelated(tmp_path)
    assert installed() == NotAmds(root)
    (reason,) = unavailable(MI300X)
    assert (reason.code, reason.found) == ("wrong_package", f"aiter at {root} is an unrelated package of that name")
    assert reason.hint.startswith("pip uninstall aiter; ")


def test_an_unrelated_module_of_that_name(tmp_path):
    (tmp_path / "aiter.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    assert installed() == NotAmds(tmp_path / "aiter.py")
    assert codes() == ["wrong_package"]


def test_a_checkout_that_is_importable_by_its_folders_name(tmp_path):
    releases.write_package(tmp_path / "aiter", "v0.1.20")
    assert installed() == NotAmds(tmp_path / "aiter", checkout=True)
    (reason,) = unavailable(MI300X)
    assert (reason.code, reason.hint) == ("wrong_package", f"cd {tmp_path / 'aiter'} && python3 setup.py develop")


def test_a_namespace_package_of_several_folders(tmp_path, monkeypatch):
    for name in ("first", "second"):
        (tmp_path / name / "aiter").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / name)
    assert codes() == ["wrong_package"]
    root = releases.write_package(tmp_path / "first", "v0.1.20")
    (root / "__init__.py").unlink()
    assert installed().root == root
    assert said() == []


def test_a_module_that_somebody_put_in_place_of_aiter(tmp_path, monkeypatch):
    root = releases.write_package(tmp_path, "v0.1.20")
    monkeypatch.setitem(sys.modules, "aiter", ModuleType("aiter"))
    assert installed().root == root
    monkeypatch.setitem(sys.modules, "aiter", None)  # as one forbids an import
    assert installed() is None
    monkeypatch.delitem(sys.modules, "aiter")
