"""Whether AITER can be used on a device, by what is installed, without importing it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

import torch

from fusion_aiter.source import Call, NotAmds, Source, Unreadable, installed
from fusion_core import Device, Reason

ARCHITECTURES = ("gfx942", "gfx950")
"""GPUs that AITER supports (its README) and has fused all-reduces for."""

MINIMUM = "v0.1.19.post2"
"""Before v0.1.19.post1 a fused kernel could return before its peers had read its input (aiter#4346, #4082); v0.1.18 to
v0.1.19.post1 lack ``transpose_scale`` (aiter#4478)."""

NEWEST = "v0.1.20.post1"
"""The newest release whose signatures this backend was written against."""

ROCM = (7, 0)
"""Compilers of earlier ROCm releases have no bfloat16: AITER's quantising kernels then add its bits as integers, and
the result is garbage."""

MENDED_RUNTIME = (7, 2, 1)
"""The first ROCm release whose ``hipEventQuery`` leaves other threads' captures alone."""

_COMMON = ("inp", "res_inp", "w", "eps", "registered", "use_1stage")

CALLS: Mapping[str, Call] = MappingProxyType(
    {
        "__init__": Call(0, ("group", "device", "max_size", "enable_register_for_capturing")),
        "fused_ar_rms": Call(0, (*_COMMON, "post_per_token_quant", "gemma_norm", "emit_bf16")),
        "fused_ar_rms_per_group_quant": Call(0, (*_COMMON, "group_size", "emit_bf16", "transpose_scale")),
        "fused_ar_rms_mxfp4_quant": Call(0, (*_COMMON, "emit_bf16")),
        "all_reduce": Call(0, ("inp", "use_new", "open_fp8_quant", "registered_input")),
        "should_custom_ar": Call(1),
        "close": Call(),
    }
)
"""The methods of ``CustomAllreduce`` that this backend calls, and how."""

INSTALL = "AMD's images have it, or build it: https://github.com/ROCm/aiter#installation"
UPGRADE = f"take a newer image of AMD's, or build {NEWEST}: https://github.com/ROCm/aiter#installation"


def unavailable(device: Device) -> Iterator[Reason]:
    """The reasons why AITER cannot be used on a device; none if it can."""
    yield from _platform(device)
    match installed():
        case None:
            yield Reason("not_installed", "aiter is not installed", f"AMD's AITER {MINIMUM} or later", hint=INSTALL)
        case NotAmds(place, checkout=True):
            yield Reason(
                "wrong_package",
                f"aiter is {place}, the root of a checkout and not its package",
                f"AMD's AITER {MINIMUM} or later, installed",
                hint=f"cd {place} && python3 setup.py develop",
            )
        case NotAmds(place):
            yield Reason(
                "wrong_package",
                f"aiter at {place} is an unrelated package of that name",
                f"AMD's AITER {MINIMUM} or later",
                hint=f"pip uninstall aiter; {INSTALL}",
            )
        case Unreadable(path, problem):
            yield Reason("unreadable", f"{path} cannot be read: {problem}", "a whole AITER", hint=INSTALL)
        case Source() as source:
            yield from _outdated(source)


def _platform(device: Device) -> Iterator[Reason]:
    arch = device.arch.partition(":")[0]  # "gfx942:sramecc+:xnack-" names features too
    if not torch.version.hip:
        yield Reason("platform", "this torch is not built for ROCm", "a ROCm build")
    elif device.type != "cuda":
        yield Reason("device", f"device is {device}", "an AMD GPU")
    elif arch == "gfx1250":
        yield Reason("arch", "AITER has no fused all-reduce for gfx1250", " or ".join(ARCHITECTURES))
    elif arch not in ARCHITECTURES:
        yield Reason("arch", f"device is {device}", " or ".join(ARCHITECTURES))
    if torch.version.hip:
        # the release that built torch, and the one that builds AITER's kernels on this machine
        for found, words in ((torch.version.hip, "torch is built for ROCm"), (rocm_version(), "the installed ROCm is")):
            if found and _numbers(found) < ROCM:
                yield Reason("rocm", f"{words} {found}", "7.0 or later", hint="take an image with ROCm 7.2.1")


def _outdated(source: Source) -> Iterator[Reason]:
    found = f"AITER at {source.root}{_metadata()}"
    if (release := release_of(source)) not in ("v0.1.19.post2", "v0.1.20 or later"):
        yield Reason("version", f"{found} is {release}, by its signatures", f"{MINIMUM} or later", hint=UPGRADE)
    else:
        for method, call in CALLS.items():
            if problem := source.problem(method, call):
                yield Reason(
                    "interface",
                    f"CustomAllreduce.{method} of {found} {problem}",
                    f"a release from {MINIMUM} to {NEWEST}",
                    hint="a later AITER may need a later fusion-core",
                )
    if (setting := expandable_segments()) and not handles_expandable_segments(source):
        yield Reason(
            "expandable_segments",
            f"{setting} is set, with which AITER before v0.1.20 ends the process",
            "v0.1.20 or later, or expandable_segments:False",
            hint=UPGRADE,
        )


def release_of(source: Source) -> str:
    """The releases that have these signatures, as a phrase after "is".

    AITER's own version cannot be trusted: shallow clones are built as 0.1.0. A build between two releases counts as the
    earlier one unless its signatures differ.
    """
    if handles_expandable_segments(source):
        return "v0.1.20 or later"
    if "_should_use_vmm" in source.names:
        transposes = source.takes("fused_ar_rms_per_group_quant", "transpose_scale")
        return "v0.1.19.post2" if transposes else "v0.1.18 to v0.1.19.post1"
    if source.takes("fused_ar_rms", "emit_bf16") or (source.names and not source.methods):
        return "no release that is known"  # the first case: builds of early July 2026, before the barriers were fixed
    if source.takes("fused_ar_rms", "gemma_norm"):
        return "v0.1.17"
    if "should_custom_ar_bytes" in source.methods:
        return "v0.1.16"
    return "v0.1.14 or v0.1.15" if "fused_ar_rms_per_group_quant" in source.methods else "older than v0.1.14"


def installed_release() -> str | None:
    """The installed AITER, as a phrase; None if AMD's AITER is not installed."""
    source = installed()
    return f"AITER at {source.root}{_metadata()}, {release_of(source)}" if isinstance(source, Source) else None


def handles_expandable_segments(source: Source) -> bool:
    """Whether this AITER works with torch's expandable segments; before v0.1.20 its constructor ends the process."""
    return "_expandable_segments_enabled" in source.names


def expandable_segments() -> str | None:
    """The environment setting that asks torch for expandable segments, or None.

    Any of three variables counts: which one torch obeys if several are set has changed between its releases.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        value = os.environ.get(name, "")
        if re.search(r"(^|,)\s*expandable_segments\s*:\s*(true|1|yes|on)\s*(,|$)", value, re.IGNORECASE):
            return f"{name}={value}"
    return None


def rocm_version() -> str | None:
    """The ROCm release installed here, such as ``"7.2.0"``; None if none is found.

    Not from ``torch.version.hip``, whose third number is a build number.
    """
    home = os.environ.get("ROCM_HOME") or os.environ.get("ROCM_PATH") or "/opt/rocm"  # in AITER's own order
    try:
        text = Path(home, ".info", "version").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = re.match(r"\s*(\d+\.\d+(\.\d+)?)", text)
    return found[1] if found else None


def known_bad_runtime() -> str | None:
    """A known bug of the installed ROCm release, as the text of a warning, or None."""
    found = rocm_version()
    if found is None or _numbers(found) >= MENDED_RUNTIME:
        return None
    return (
        f"ROCm is {found}: before 7.2.1 hipEventQuery, which torch's watchdog thread calls, can break a graph capture "
        "that is under way in another thread (ROCm/aiter#2857)"
    )


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, at most three."""
    found = re.match(r"\d+(\.\d+){0,2}", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _metadata() -> str:
    """The version in the distribution's metadata, in brackets: for people to read, never for a decision."""
    try:
        return f" (amd-aiter {version('amd-aiter')})"
    except PackageNotFoundError:
        return ""
