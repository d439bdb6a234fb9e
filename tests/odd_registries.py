"""Registries of one rank that differs from the others, by what it differs in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import fusion_core
from fusion_core import Dialect, DType, FusionConfig, Reading, Reason, Registry, Strategy
from fusion_core.plugins.registry import GROUP
from fusion_core.site import Device
from fusion_core.tables.machine import Machine
from fusion_core.tables.table import UNFUSED, Row, Table
from tests.corpus.case import ADD
from tests.models import plugins

HIDDEN, TOKENS = 64, 4
REFERENCE = EntryPoint("reference", "fusion_reference", GROUP)

Making = Callable[[bool], Registry]
"""From whether this rank is the odd one to its registry."""


def _strategies(*requires: Any) -> Callable[[], Iterator[Strategy]]:
    def declared() -> Iterator[Strategy]:
        outputs = ("normed", "residual_out")
        yield Strategy(ADD, "acme.add", plugins._add_rms_norm, requires=requires, outputs=outputs)

    return declared


plain = SimpleNamespace(fusion_strategies=fusion_core.hookimpl(_strategies()))
stricter = SimpleNamespace(fusion_strategies=fusion_core.hookimpl(_strategies(DType("x", torch.float32))))
absent = SimpleNamespace(
    fusion_strategies=plain.fusion_strategies,
    fusion_available=fusion_core.hookimpl(lambda device: [Reason("driver", "the driver is 1", "2")]),
)
_WORDS = {"x": "x", "group": "group"}
reading = SimpleNamespace(
    fusion_strategies=plain.fusion_strategies,
    fusion_dialects=fusion_core.hookimpl(
        lambda: [Dialect("acme", {"acme::sum": Reading("all_reduce", _WORDS, results={"reduced": 0})})]
    ),
)


@dataclass
class Kernels(Distribution):
    """A distribution that lists no files."""

    number: str

    def read_text(self, filename: str) -> str | None:
        said = f"Metadata-Version: 2.1\nName: acme-kernels\nVersion: {self.number}\n"
        return said if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path("/nowhere", path)


def point(attribute: str, version: str = "1.0") -> EntryPoint:
    """An entry point named acme, of a distribution."""
    found = EntryPoint("acme", f"{__name__}:{attribute}", GROUP)
    vars(found)["dist"] = Kernels(version)
    return found


def of(*points: EntryPoint, **config: Any) -> Registry:
    return Registry.of([*points, REFERENCE], FusionConfig(**{"merge": True, **config}))


def _with(ordinary: Registry, **environment: str) -> Registry:
    with mock.patch.dict(os.environ, environment):
        return replace(ordinary, config=FusionConfig(merge=True))


def _table(us: float) -> Table:
    rows = (Row(ADD, "bfloat16", HIDDEN, TOKENS, {UNFUSED: 20.0, "acme.add": us}),)
    return Table(Machine.here(2, Device("cpu")), rows, "2026-11-22T10:00:00+00:00", "a measurement")


def keep_tables_in(folder: str) -> None:
    tables.append(folder)


tables: list[str] = []


def _measured(us: float) -> Registry:
    """Each rank has a file of its own."""
    file = Path(tables[-1], f"{dist.get_rank()}.json")
    file.write_text(json.dumps(_table(us).to_dict()), encoding="utf-8")
    return of(point("plain"), table=str(file))


def _failing() -> Registry:
    with mock.patch("fusion_core.plugins.registry.warn_once"):
        return of(point("not_there"))


DIFFERENCES: dict[str, Making] = {
    "nothing": lambda odd: of(point("plain")),
    "missing": lambda odd: of() if odd else of(point("plain")),
    "failing": lambda odd: _failing() if odd else of(point("plain")),
    "unavailable": lambda odd: of(point("absent" if odd else "plain")),
    "version": lambda odd: of(point("plain", "1.1" if odd else "1.0")),
    "declaration": lambda odd: of(point("stricter" if odd else "plain")),
    "dialect": lambda odd: of() if odd else of(point("reading")),
    "order": lambda odd: of() if not odd else _with(of(), FUSION_CORE_ORDER="reference"),
    "limit": lambda odd: of(point("plain")) if not odd else _with(of(point("plain")), FUSION_CORE_LIMIT="1"),
    "strict": lambda odd: of(point("plain"), strict=odd),
    "table": lambda odd: _measured(10.0 if odd else 30.0),
    "the same table": lambda odd: _measured(30.0),
    "no backend": lambda odd: Registry.of([] if odd else [REFERENCE], FusionConfig()),
}
