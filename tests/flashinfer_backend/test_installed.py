"""What the installed FlashInfer has, and why it cannot be used: read from files, without an import."""

import importlib.metadata
import sys
from importlib.machinery import PathFinder

import pytest
import torch

from fusion_core import Device
from fusion_flashinfer import availability, strategies
from fusion_flashinfer.requirements import KernelPresent
from tests.flashinfer_backend.sites import B200, H100, PLAIN, expanded, said, site_of

pytestmark = pytest.mark.usefixtures("nothing_is_imported")

SOURCE = """
class Other:
    kAllReduce = 77


class AllReduceFusionPattern:
    # NOTE: as FlashInfer writes them
    kAllReduce = 0
    kARResidualRMSNorm = 1
    kARResidualRMSNormFP8Quant = 2


class AllReduceFusionOp:
    kAllReduce = 99


raise RuntimeError("this must not be imported")
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a FlashInfer of this source, and what it imports, in front of what is installed."""

    def now(source=SOURCE, version="0.7.2.post1", lacking=()):
        files = {
            "flashinfer/__init__.py": "raise RuntimeError('this must not be imported')",
            "flashinfer/comm/trtllm_ar.py": source,
            "flashinfer_python-0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flashinfer-python\nVersion: {version}\n",
            "tvm_ffi/__init__.py": "",
            "cuda/bindings/__init__.py": "",
        }
        for name, text in files.items():
            if text is not None and not name.startswith(tuple(lacking)):
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")

        def spec(module):
            path = [str(tmp_path)]
            for part in module.split("."):
                found = PathFinder.find_spec(part, path)
                path = None if found is None else list(found.submodule_search_locations or ())
                if found is None:
                    return None
            return found

        def version_of(name):
            found = [d for d in importlib.metadata.distributions(path=[str(tmp_path)]) if d.metadata["Name"] == name]
            if not found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[0].version

        monkeypatch.setattr(availability, "_spec", spec)
        monkeypatch.setattr(availability, "version", version_of)
        availability.pattern_codes.cache_clear()

    yield now
    monkeypatch.undo()
    availability.pattern_codes.cache_clear()


def test_codes_are_read_from_the_source(install):
    install()
    assert availability.pattern_codes() == {
        "kAllReduce": 0,
        "kARResidualRMSNorm": 1,
        "kARResidualRMSNormFP8Quant": 2,
    }


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (SOURCE, None),
        (SOURCE.replace("    kARResidualRMSNorm = 1\n", ""), "the installed FlashInfer has no kARResidualRMSNorm"),
        (SOURCE.replace("RMSNorm = 1", "RMSNorm = 13"), "the installed FlashInfer has kARResidualRMSNorm as 13"),
        (SOURCE.replace("kARResidualRMSNorm = 1", "kFused = 1"), "the installed FlashInfer has no kARResidualRMSNorm"),
        ("", "the installed FlashInfer has no kARResidualRMSNorm"),
    ],
    ids=["as it is", "missing", "renumbered", "renamed", "no such class"],
)
def test_a_pattern_that_the_installed_release_lacks_is_refused(install, source, words):
    install(source)
    (strategy,) = [s for s in expanded(strategies._strategies()) if s.name == "flashinfer.all_reduce_add_rms_norm"]
    found = said(strategy, site_of(PLAIN[0] if words else strategy))
    needs = ", needs kARResidualRMSNorm = 1, as flashinfer-python 0.7.2 has it"
    assert (f"{words}{needs}" in found) if words else found == []


def test_without_the_file_every_pattern_is_refused(install):
    install(lacking=("flashinfer/comm",))
    assert KernelPresent.here("kAllReduce", 0).installed is None


def test_without_flashinfer_the_declarations_are_whole(install):
    install(lacking=("flashinfer",))
    assert KernelPresent.here("kAllReduce", 0) == KernelPresent("kAllReduce", 0, 0)


def test_two_releases_give_two_cache_keys():
    assert repr(KernelPresent("k", 1, 1)) != repr(KernelPresent("k", 1, None))


HINT = "; pip install -U 'fusion-core[flashinfer]'"


@pytest.mark.parametrize(
    ("device", "lacking", "version", "words"),
    [
        (H100, (), "0.7.2.post1", []),
        (B200, (), "0.8.0", []),
        (Device("cuda", "sm_120"), (), "0.7.2", []),
        (Device("cuda", "sm_103"), (), "1.0", []),
        (Device("cpu"), (), "0.7.2", ["device is cpu, needs an NVIDIA GPU"]),
        (Device("xpu"), (), "0.7.2", ["device is xpu, needs an NVIDIA GPU"]),
        (Device("cuda", "sm_80"), (), "0.7.2", ["device is cuda (sm_80), needs compute capability 9, 10 or 12"]),
        (Device("cuda", "sm_89"), (), "0.7.2", ["device is cuda (sm_89), needs compute capability 9, 10 or 12"]),
        (Device("cuda", "sm_110"), (), "0.7.2", ["device is cuda (sm_110), needs compute capability 9, 10 or 12"]),
        (H100, ("flashinfer/",), "0.7.2", ["flashinfer is not installed, needs flashinfer-python >= 0.7.2" + HINT]),
        (H100, ("flashinfer_python",), "0.7.2",
         ["flashinfer has no metadata of flashinfer-python, needs flashinfer-python >= 0.7.2" + HINT]),
        (H100, (), "0.7.1", ["flashinfer-python is 0.7.1, needs 0.7.2 or later" + HINT]),
        (H100, (), "0.6.18.post1", ["flashinfer-python is 0.6.18.post1, needs 0.7.2 or later" + HINT]),
        (H100, (), "0.10.0", []),
        (H100, (), "0.8.0.dev20261101+cu130", []),
        (H100, (), "0.7.2rc1", ["flashinfer-python is 0.7.2rc1, needs 0.7.2 or later" + HINT]),
        (H100, (), "0.7.2.dev1", ["flashinfer-python is 0.7.2.dev1, needs 0.7.2 or later" + HINT]),
        (H100, (), "main", ["flashinfer-python is main, needs 0.7.2 or later" + HINT]),
        (H100, ("tvm_ffi",), "0.7.2",
         ["apache-tvm-ffi is not installed, which flashinfer.comm imports, needs apache-tvm-ffi; pip install apache-tvm-ffi"]),
        (H100, ("cuda",), "0.7.2",
         ["cuda-bindings is not installed, which flashinfer.comm imports, needs cuda-bindings; pip install cuda-bindings"]),
        (Device("cuda", "sm_80"), ("tvm_ffi",), "0.7.0",
         ["device is cuda (sm_80), needs compute capability 9, 10 or 12", "flashinfer-python is 0.7.0, needs 0.7.2 or later" + HINT,
          "apache-tvm-ffi is not installed, which flashinfer.comm imports, needs apache-tvm-ffi; pip install apache-tvm-ffi"]),
    ],
)  # fmt: skip
def test_why_it_cannot_be_used(install, device, lacking, version, words):
    install(lacking=lacking, version=version)
    assert [str(reason) for reason in availability.unavailable(device)] == words


def test_a_torch_for_amd(install, monkeypatch):
    install()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    words = [str(reason) for reason in availability.unavailable(Device("cuda", "gfx942"))]
    assert words == ["this torch is built for ROCm, needs a CUDA build"]


def test_packages_are_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "fusion_probe_me").mkdir()
    (tmp_path / "fusion_probe_me" / "__init__.py").write_text("raise RuntimeError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert availability._spec("fusion_probe_me") is not None
    assert availability._spec("fusion_nowhere.at_all") is None
    assert "fusion_probe_me" not in sys.modules


@pytest.mark.parametrize(
    ("arch", "major"), [("sm_90", 9), ("sm_90a", 9), ("sm_100", 10), ("sm_120", 12), ("gfx942", 0), ("", 0), ("sm_", 0)]
)
def test_capability(arch, major):
    assert availability.capability(Device("cuda", arch)) == major
