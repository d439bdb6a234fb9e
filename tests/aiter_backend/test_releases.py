"""Which releases of AITER can be used: packages on disk with each release's signatures, no GPU."""

import pytest

from fusion_aiter import availability
from fusion_aiter.availability import CALLS, UPGRADE, unavailable
from fusion_aiter.source import Source, installed
from fusion_core import Device
from tests.aiter_backend import releases
from tests.aiter_backend.on_disk import MI300X, MI355X, communicator, said

pytestmark = pytest.mark.usefixtures("machine")

TOO_OLD = [release for release in releases.ALL if release not in releases.SUPPORTED]


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
