"""Whether this machine can run AITER: its torch, GPU, ROCm and settings, by the reasons' words, no GPU."""

import os
import subprocess
import sys

import pytest
import torch

from fusion_aiter import availability
from fusion_aiter.availability import UPGRADE
from fusion_aiter.source import installed
from fusion_core import Device
from tests.aiter_backend import releases
from tests.aiter_backend.on_disk import MI300X, codes, rocm, said

pytestmark = pytest.mark.usefixtures("machine")


def test_a_torch_that_is_not_for_amd(tmp_path, monkeypatch):
    releases.write_package(tmp_path, "v0.1.20")
    monkeypatch.setattr(torch.version, "hip", None)
    for device in (MI300X, Device("cpu"), Device("cuda", "sm_90")):
        assert said(device) == ["this torch is not built for ROCm, needs a ROCm build"]


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (Device("cpu"), "device is cpu, needs an AMD GPU"),
        (Device("cuda", "gfx90a"), "device is cuda (gfx90a), needs gfx942 or gfx950"),
        (Device("cuda", "gfx90a:sramecc+:xnack-"), "device is cuda (gfx90a:sramecc+:xnack-), needs gfx942 or gfx950"),
        (Device("cuda", "gfx1201"), "device is cuda (gfx1201), needs gfx942 or gfx950"),
        (Device("cuda"), "device is cuda, needs gfx942 or gfx950"),
        (Device("cuda", "gfx1250"), "AITER has no fused all-reduce for gfx1250, needs gfx942 or gfx950"),
    ],
    ids=str,
)
def test_other_devices(tmp_path, device, words):
    releases.write_package(tmp_path, "v0.1.20")
    assert said(device) == [words]


@pytest.mark.parametrize(
    ("hip", "installed_rocm", "words"),
    [
        ("6.4.43482-0f2d60242", "7.2.1", ["torch is built for ROCm 6.4.43482-0f2d60242, needs 7.0 or later; take an image with ROCm 7.2.1"]),
        ("7.0.51831-a3e329ad8", "6.4.1-83", ["the installed ROCm is 6.4.1, needs 7.0 or later; take an image with ROCm 7.2.1"]),
        ("5.7", "6.2.0", ["torch is built for ROCm 5.7, needs 7.0 or later; take an image with ROCm 7.2.1", "the installed ROCm is 6.2.0, needs 7.0 or later; take an image with ROCm 7.2.1"]),
        ("unknown", "7.2.1", ["torch is built for ROCm unknown, needs 7.0 or later; take an image with ROCm 7.2.1"]),
        ("7.0", "7.0.0", []),
        ("7.15.26333", "10.0.0", []),
        ("7.2.26015", "nonsense", []),
    ],
)  # fmt: skip
def test_the_rocm_release(tmp_path, monkeypatch, hip, installed_rocm, words):
    releases.write_package(tmp_path, "v0.1.20")
    monkeypatch.setattr(torch.version, "hip", hip)
    rocm(tmp_path, installed_rocm)
    assert said() == words


@pytest.mark.parametrize(
    ("text", "version"),
    [("7.2.0-43\n", "7.2.0"), ("7.2.0.70200-43", "7.2.0"), (" 7.1\n", "7.1"), ("", None), ("unknown", None)],
)
def test_the_installed_rocm_release(tmp_path, text, version):
    rocm(tmp_path, text)
    assert availability.rocm_version() == version


def test_where_rocm_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "nowhere"))
    assert availability.rocm_version() is None
    assert availability.known_bad_runtime() is None
    monkeypatch.setenv("ROCM_HOME", str(tmp_path / "rocm"))
    assert availability.rocm_version() == "7.2.1"


@pytest.mark.parametrize(
    ("text", "bad"), [("7.0.2", True), ("7.2.0-43", True), ("7.2.1", False), ("7.2.2", False), ("7.10.0", False)]
)
def test_runtimes_that_can_break_a_capture(tmp_path, text, bad):
    releases.write_package(tmp_path, "v0.1.20")
    rocm(tmp_path, text)
    warning = availability.known_bad_runtime()
    assert (warning is not None) == bad
    assert warning is None or ("ROCm/aiter#2857" in warning and "7.2.1" in warning)
    assert said() == []


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
@pytest.mark.parametrize(
    ("value", "on"),
    [
        ("expandable_segments:True", True),
        ("max_split_size_mb:128, expandable_segments : true ", True),
        ("EXPANDABLE_SEGMENTS:TRUE,roundup_power2_divisions:[256:1,512:2]", True),
        ("expandable_segments:1", True),
        ("expandable_segments:False", False),
        ("max_split_size_mb:128", False),
        ("not_expandable_segments:True", False),
        ("", False),
    ],
)
def test_the_setting_for_expandable_segments(monkeypatch, name, value, on):
    monkeypatch.setenv(name, value)
    assert availability.expandable_segments() == (f"{name}={value}" if on else None)


def test_expandable_segments_need_a_later_release(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_HIP_ALLOC_CONF", "expandable_segments:True")
    for release in releases.ALL:
        root = releases.write_package(tmp_path / release, release)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / release)
            assert installed().root == root
            found = codes()
        handled = release in ("v0.1.20", "v0.1.20.post1", "HEAD")
        old = [] if release in releases.SUPPORTED else ["version"]
        assert found == ([] if handled else [*old, "expandable_segments"])


def test_the_words_for_expandable_segments(tmp_path, monkeypatch):
    releases.write_package(tmp_path, "v0.1.19.post2")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert said() == [
        "PYTORCH_ALLOC_CONF=expandable_segments:True is set, with which AITER before v0.1.20 ends the process, "
        f"needs v0.1.20 or later, or expandable_segments:False; {UPGRADE}"
    ]


def test_all_reasons_are_told(tmp_path, monkeypatch):
    releases.write_package(tmp_path, "v0.1.16")
    monkeypatch.setattr(torch.version, "hip", "6.4.43482-0f2d60242")
    rocm(tmp_path, "6.4.1")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert codes(Device("cuda", "gfx90a")) == ["arch", "rocm", "rocm", "version", "expandable_segments"]


def test_asking_imports_nothing(tmp_path):
    # In a process of its own. What fusion_core itself brings, sympy among it, is not this module's doing.
    releases.write_package(tmp_path, "v0.1.20")
    program = """
import sys
import fusion_core
import torch
before = set(sys.modules)
import fusion_aiter.availability
torch.version.hip = "7.2.0"
print([str(reason) for reason in fusion_aiter.availability.unavailable(fusion_core.Device("cuda", "gfx942"))])
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    reasons, brought = ran.stdout.splitlines()
    assert reasons == "[]"
    assert "fusion_aiter" in brought.split()
    assert set(brought.split()).isdisjoint({"aiter", "sympy", "triton", "torch"})
