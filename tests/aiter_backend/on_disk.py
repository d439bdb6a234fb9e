"""ROCm and AITER as files on a machine's disk, and what availability says of that machine."""

from fusion_aiter.availability import unavailable
from fusion_core import Device
from tests.aiter_backend import releases

MI300X, MI355X = Device("cuda", "gfx942"), Device("cuda", "gfx950")


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
