"""For tests of what is known without AITER: a machine, and that nothing imports AITER."""

import sys
from pathlib import Path

import pytest
import torch

from tests.aiter_backend.on_disk import rocm

HIP = "7.0.51831-a3e329ad8"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with ROCm 7.2.1 and without AITER, whatever the one that the tests run on has."""
    monkeypatch.setattr(torch.version, "hip", HIP)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(place for place in sys.path if not _has_aiter(place))])
    monkeypatch.setattr(
        sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    )
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "ROCM_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    rocm(tmp_path, "7.2.1-81\n")
    yield
    assert "aiter" not in sys.modules


def _has_aiter(place):
    return Path(place or ".", "aiter").exists() or Path(place or ".", "aiter.py").exists()


@pytest.fixture
def nothing_is_imported():
    assert "aiter" not in sys.modules
    yield
    assert "aiter" not in sys.modules
