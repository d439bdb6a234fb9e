"""The backend `aiter` over the model of AITER, on a CPU that counts as the GPU that ``GPU_ARCHS`` names.

A plugin for processes of their own: importing it changes what its process takes the CPU for. All that stands between a
model's graph and AITER's methods is the real thing, availability included, which reads the model's source.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

import fusion_aiter.testing  # noqa: F401  # the kit imports it by itself for the backend that is installed
from fusion_aiter import availability
from fusion_aiter.strategies import STRATEGIES
from fusion_core import Device, Reason, Strategy, hookimpl

HERE = Device("cpu", os.environ["GPU_ARCHS"])
MODEL = Path(__file__).with_name("model")

if str(MODEL) not in sys.path:
    sys.path.insert(0, str(MODEL))
Device.of = classmethod(lambda cls, device: HERE if device.type == "cpu" else cls(device.type))  # type: ignore[method-assign]
Device.here = classmethod(lambda cls: HERE)  # type: ignore[method-assign]


@hookimpl
def fusion_available(device: Device) -> Iterator[Reason]:
    with mock.patch.object(torch.version, "hip", "7.2.1"):
        yield from tuple(availability.unavailable(Device("cuda", device.arch)))


@hookimpl
def fusion_strategies() -> tuple[Strategy, ...]:
    return STRATEGIES
