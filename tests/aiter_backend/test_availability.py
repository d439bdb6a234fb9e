"""Whether AITER can be used, by the reasons' words: packages on disk with each release's signatures, no GPU."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fusion_aiter import availability
from fusion_aiter.availability import CALLS, UPGRADE, unavailable
from fusion_aiter.source import Call, NotAmds, Source, Unreadable, installed
from fusion_core import Device
from tests.aiter_backend import releases

MI300X, MI355X = Device("cuda", "gfx942"), Device("cuda", "gfx950")
TOO_OLD = [release for release in releases.ALL if release not in releases.SUPPORTED]
HIP = "7.0.51831-a3e329ad8"


@pytest.fixture(autouse=True)
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


def rocm(folder, text):
    path = folder / "rocm" / ".info" / "version"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def said(device=MI300X):
    return [str(reason) for reason in unavailable(device)]


def codes(device=MI300X):
    return [reason.code for reason in unavailable(device)]


def communicator(folder, text):
    """A package of AMD's whose module of CustomAllreduce has this text."""
    path = releases.write_package(folder, "v0.1.20") / releases.COMMUNICATOR
    path.write_text(text, encoding="utf-8")
    return path


def methods(folder, text):
    communicator(folder, text)
    found = installed()
    assert isinstance(found, Source)
    return {name: [str(signature) for signature in some] for name, some in found.methods.items()}


@pytest.mark.parametrize("release", releases.SUPPORTED)
@pytest.mark.parametrize("device", [MI300X, MI355X, Device("cuda", "gfx942:sramecc+:xnack-")], ids=str)
def test_a_supported_release_can_be_used(tmp_path, release, device):
    releases.write_package(tmp_path, release)
    assert said(device) == []


@pytest.mark.parametrize("release", TOO_OLD)
def test_an_older_release_cannot_and_the_reason_names_the_one_that_can(tmp_path, release):
    root = releases.write_package(tmp_path, release)
    (reason,) = unavailable(MI300X)
    assert reason.code == "version"
    assert reason.found.startswith(f"AITER at {root} is ")
    assert (reason.needs, reason.hint) == ("v0.1.19.post2 or later", UPGRADE)


@pytest.mark.parametrize(
    ("words", "which"),
    [
        ("older than v0.1.14", ("v0.1.5", "v0.1.7", "v0.1.12.post2", "v0.1.13.post1")),
        ("v0.1.14 or v0.1.15", ("v0.1.14", "v0.1.14.post1", "v0.1.15", "v0.1.15.post3")),
        ("v0.1.16", ("v0.1.16", "v0.1.16.post6")),
        ("v0.1.17", ("v0.1.17",)),
        ("v0.1.18 to v0.1.19.post1", ("v0.1.18", "v0.1.19", "v0.1.19.post1")),
        ("v0.1.19.post2", ("v0.1.19.post2",)),
        ("v0.1.20 or later", ("v0.1.20", "v0.1.20.post1", "HEAD")),
    ],
)
def test_which_release_it_is_by_its_signatures(tmp_path, words, which):
    for release in which:
        releases.write_package(tmp_path / release, release)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(tmp_path / release)
            found = installed()
        assert isinstance(found, Source)
        assert availability.release_of(found) == words


def test_the_words_for_an_old_release(tmp_path):
    root = releases.write_package(tmp_path, "v0.1.18")
    words = f"is v0.1.18 to v0.1.19.post1, by its signatures, needs v0.1.19.post2 or later; {UPGRADE}"
    assert said() == [f"AITER at {root} {words}"]
    metadata = tmp_path / "amd_aiter-0.1.18.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: amd-aiter\nVersion: 0.1.18\n", encoding="utf-8")
    assert said() == [f"AITER at {root} (amd-aiter 0.1.18) {words}"]


def test_metadata_decides_nothing(tmp_path):
    releases.write_package(tmp_path, "v0.1.20")
    metadata = tmp_path / "amd_aiter-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: amd-aiter\nVersion: 0.1.0\n", encoding="utf-8")
    assert said() == []


def test_a_build_between_releases_that_has_the_signatures_and_lacks_the_fixes(tmp_path):
    # the main branch of 2026-07-07: emit_bf16 had come, transpose_scale had not gone, the barriers were not mended
    communicator(tmp_path, releases.source("v0.1.19.post2").replace("def _should_use_vmm", "def _other"))
    assert all(installed().problem(method, call) is None for method, call in CALLS.items())
    (reason,) = unavailable(MI300X)
    assert (reason.code, "is no release that is known" in reason.found) == ("version", True)


def test_a_module_without_the_class(tmp_path):
    communicator(tmp_path, "from aiter.dist.elsewhere import CustomAllreduce\n")
    (reason,) = unavailable(MI300X)
    assert (reason.code, "is no release that is known" in reason.found) == ("version", True)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("def close(self)", "def shut(self)", "close of AITER at {} is not there"),
        ("def close(self)", "def close(self, wait)", "missing a required argument: 'wait'"),
        ("open_fp8_quant=False, registered_input=False", "registered_input=False", "unexpected keyword argument 'open_fp8_quant'"),
        ("gemma_norm=False, emit_bf16=False)", "emit_bf16=False)", "unexpected keyword argument 'gemma_norm'"),
        ("inp, res_inp, *,", "x, res_inp, *,", "missing a required argument: 'x'"),
    ],
    ids=["gone", "requires more", "keyword gone", "gemma_norm gone", "renamed"],
)  # fmt: skip
def test_a_later_release_that_is_called_otherwise(tmp_path, old, new, problem):
    text = releases.source("HEAD")
    assert old in text
    path = communicator(tmp_path, text.replace(old, new))
    reasons = list(unavailable(MI300X))
    assert {reason.code for reason in reasons} == {"interface"}
    assert problem.format(path.parents[2]) in reasons[0].found
    assert reasons[0].needs == "a release from v0.1.19.post2 to v0.1.20.post1"


@pytest.mark.parametrize("release", releases.SUPPORTED)
@pytest.mark.parametrize("method", CALLS)
def test_every_call_fits_every_supported_release(release, method):
    signature = releases.signature(f"CustomAllreduce.{method}", release)
    assert signature is not None
    call = CALLS[method]
    signature.bind(None, *[None] * call.positional, **dict.fromkeys(call.keywords))


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


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"class CustomAllreduce(:\n", "(line 1)"),
        (b"x = 1\n\xff\xfe\n", "utf-8"),
        (b"x = 1\n\x00\n", "null bytes"),
        (b"class CustomAllreduce:\n    def close(self, a, a): ...\n", "duplicate parameter name"),
    ],
    ids=["syntax", "encoding", "null bytes", "duplicate parameter"],
)
def test_a_file_that_cannot_be_parsed(tmp_path, content, problem):
    path = communicator(tmp_path, "")
    path.write_bytes(content)
    assert isinstance(installed(), Unreadable)
    (reason,) = unavailable(MI300X)
    assert reason.code == "unreadable"
    assert reason.found.startswith(f"{path} cannot be read: ")
    assert problem in reason.found


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = communicator(tmp_path, releases.source("HEAD"))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert installed() == Unreadable(path, "Permission denied")


def test_a_folder_that_may_not_be_entered(tmp_path, monkeypatch):
    path = communicator(tmp_path, releases.source("HEAD"))

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    assert installed() == Unreadable(path, "Permission denied")


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    path = communicator(tmp_path, releases.source("v0.1.18"))
    assert codes() == ["version"]
    assert installed() is installed()
    path.write_text(releases.source("HEAD"), encoding="utf-8")
    assert codes() == []


def test_a_warning_of_the_parser_is_not_passed_on(tmp_path):
    communicator(tmp_path, releases.source("HEAD") + "\npattern = '\\d'\n")
    assert said() == []


def test_definitions_in_blocks(tmp_path):
    assert methods(
        tmp_path,
        """
class CustomAllreduce:
    if torch.version.hip:
        def close(self): ...
    else:
        def close(self, wait): ...
    try:
        def capture(self): ...
    except Exception:
        pass
    finally:
        async def dispose(self): ...
    with something:
        match arch:
            case "gfx942":
                def all_reduce(self, inp, /, *args, out=None, **kwargs): ...
    def twice(self, old): ...
    def twice(self, new=1): ...
    @overload
    def twice(self, typed): ...
    @staticmethod
    def shape(dim): ...
    @functools.wraps(shape)
    @contextmanager
    def wrapped(self, *, size): ...
""",
    ) == {
        "close": ["()", "(wait)"],
        "capture": ["()"],
        "dispose": ["()"],
        "all_reduce": ["(inp, /, *args, out='None', **kwargs)"],
        "twice": ["(new='1')"],
        "shape": ["(dim)"],
        "wrapped": ["(*, size)"],
    }


def test_a_class_in_blocks_and_with_bases(tmp_path):
    assert methods(
        tmp_path,
        """
class Base(elsewhere.Unknown):
    def close(self): ...
    def capture(self): ...
class Gfx1250:
    def vmm(self): ...
if is_gfx1250:
    class CustomAllreduce(Gfx1250):
        def capture(self, stream): ...
else:
    class CustomAllreduce(Base, metaclass=Meta):
        def all_reduce(self, inp): ...
class Circle(CustomAllreduce): ...
""",
    ) == {
        "vmm": ["()"],
        "capture": ["(stream)", "()"],
        "close": ["()"],
        "all_reduce": ["(inp)"],
    }


def test_names_that_the_module_has(tmp_path):
    communicator(
        tmp_path,
        """
import os.path
import torch.distributed as dist
from aiter.utility import fp8 as float8, _expandable_segments_enabled
first, (second, *rest) = 1, (2, 3)
typed: int = 4
thing.attribute = 5
def function():
    local = 6
try:
    class Inner:
        member = 7
except ImportError:
    fallback = None
""",
    )
    expected = "os dist float8 _expandable_segments_enabled first second rest typed function Inner fallback"
    assert installed().names == set(expected.split())


def test_a_parameter_counts_where_every_definition_has_it():
    with_it, without = inspect.signature(lambda inp, *, eps: 0), inspect.signature(lambda inp: 0)
    found = Source(Path("aiter"), frozenset(), {"both": (with_it, with_it), "one": (with_it, without)})
    assert found.takes("both", "eps")
    assert not found.takes("one", "eps")
    assert not found.takes("none", "eps")
    assert found.problem("both", Call(1, ("eps",))) is None
    assert "unexpected keyword argument 'eps'" in found.problem("one", Call(1, ("eps",)))


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


def test_signatures_as_releases_had_them():
    group = "CustomAllreduce.fused_ar_rms_per_group_quant"
    has = [release for release in releases.ALL if "transpose_scale" in str(releases.signature(group, release))]
    assert has == ["v0.1.17", *releases.SUPPORTED]
    assert releases.signature(group, "v0.1.13.post1") is None
    assert releases.signature("CustomAllreduce.register_buffer", "v0.1.10") is not None
    assert releases.signature("CustomAllreduce.register_buffer", "v0.1.11") is None
    constructor = releases.signature("CustomAllreduce.__init__", "v0.1.11")
    assert str(constructor) == "(self, group, device, max_size=134217728, enable_register_for_capturing=True)"
    with pytest.raises(KeyError):
        releases.signature("CustomAllreduce.nonsense", "HEAD")


@pytest.mark.parametrize("release", releases.ALL[1:])
def test_what_is_written_is_what_is_read(tmp_path, release):
    releases.write_package(tmp_path, release)
    read = installed()
    assert isinstance(read, Source)
    names = [name for name in releases.names(release) if name.startswith("CustomAllreduce.")]
    assert set(read.methods) == {name.partition(".")[2] for name in names}
    for name in names:
        (signature,) = read.methods[name.partition(".")[2]]
        _, *known = releases.signature(name, release).parameters.values()
        facts = [(each.name, each.kind, each.default is each.empty) for each in signature.parameters.values()]
        assert facts == [(each.name, each.kind, each.default is each.empty) for each in known]
