"""The machine that a table was measured on, and its comparison with this one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from typing import Any

import torch

from fusion_core.reason import Reason
from fusion_core.site import Device
from fusion_core.tables.links import UNKNOWN, driver_version, links_between

DISTRIBUTIONS = ("fusion-core", "torch", "triton", "pytorch-triton-rocm", "flashinfer-python", "amd-aiter")
"""Distributions whose versions affect the speed of a path; reports about a machine list them."""

OWN = "fusion-core"
"""Recorded but not compared: a table stays valid in releases that do not change the kernels."""

HINT = "fusion-core tune measures this machine"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the times of kernels depend on.

    Attributes:
        gpu: The name of the GPU from its driver; ``"cpu"`` if there is none.
        arch: Its architecture: ``"sm_90"``, ``"gfx942"``.
        links: The links between the GPUs: ``"nvlink 18"``, ``"no nvlink"``, ``"several hosts"``, ``"unknown"``.
        world_size: The number of ranks in the process group.
        driver: The version of the GPU's driver, or empty.
        versions: Versions of the installed `DISTRIBUTIONS`.
    """

    gpu: str
    arch: str = ""
    links: str = ""
    world_size: int = 1
    driver: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.gpu, self.arch, self.links, self.world_size, self.driver, *sorted(self.versions.items())))

    @classmethod
    def here(cls, world_size: int, device: Device | None = None) -> Machine:
        """This machine, for a process group of ``world_size`` ranks on ``device`` (None for the default device)."""
        device = Device.here() if device is None else device
        if device.type != "cuda" or not torch.cuda.is_available():
            return cls(device.type, device.arch, "", world_size, "", installed_versions())
        name = torch.cuda.get_device_properties(torch.cuda.current_device()).name
        return cls(name, device.arch, links_between(world_size), world_size, driver_version(), installed_versions())

    def to_dict(self) -> dict[str, Any]:
        """The machine as plain JSON types."""
        return asdict(self)


def installed_versions() -> dict[str, str]:
    """The versions of those of `DISTRIBUTIONS` that are installed."""
    return dict(_installed())


@functools.cache
def _installed() -> Mapping[str, str]:
    found = {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None}
    return {**found, "torch": str(torch.__version__)}  # names the CUDA or ROCm it was built for; metadata may not


def _version(distribution: str) -> str | None:
    try:
        return distribution_version(distribution)
    except PackageNotFoundError:
        return None


def refusal(measured: Machine, here: Machine, shipped: bool) -> Reason | None:
    """The reason why a table of one machine is not valid on this one, with all differences, or None if it is.

    Args:
        measured: The table's machine.
        here: This one. If its links are unknown, they are not compared.
        shipped: Whether the table came with the package. The versions of the driver and the libraries are then not
            compared, since few machines would have the same.
    """
    found, wanted = _facts(measured, shipped), _facts(here, shipped)
    if here.links == UNKNOWN:
        del found["links"], wanted["links"]
    # in the order of the facts, the table's first; a library may be missing on either side
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if not differing:
        return None

    def text(facts: Mapping[str, str]) -> str:
        return ", ".join(f"{name} {facts.get(name) or 'none'}" for name in differing)

    return Reason("machine", f"the table was measured with {text(found)}", f"{text(wanted)}, as here", hint=HINT)


def _facts(machine: Machine, shipped: bool) -> dict[str, str]:
    """The facts to compare, by name."""
    facts = {"gpu": machine.gpu, "arch": machine.arch, "links": machine.links, "ranks": str(machine.world_size)}
    if shipped:
        return facts
    versions = {name: found for name, found in machine.versions.items() if name != OWN}
    return {**facts, "driver": machine.driver, **versions}
