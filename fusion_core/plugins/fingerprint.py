"""One key for everything that a compiled graph depends on."""

from __future__ import annotations

import functools
import hashlib
import inspect
import linecache
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from types import CodeType
from typing import Any

import torch

from fusion_core._torch.distributed import groups
from fusion_core._torch.operators import schema_of
from fusion_core.config import KEPT
from fusion_core.errors import BackendError, described, shown
from fusion_core.lift.dialect import Dialect
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.sources import core_sources
from fusion_core.plugins.strategy import Strategy
from fusion_core.site import Device


def version() -> str:
    """The version of fusion_core."""
    try:
        return distribution_version("fusion-core")
    except PackageNotFoundError:
        return "unknown"


def fingerprint(registry: Registry, dry_run: bool = False) -> str:
    """A hash over core's and all plugins' files, declarations, libraries' versions, order, configuration and device.

    Whatever changes a decision or the emitted code must change the hash: the pass never sees a graph from Inductor's
    cache.
    """
    device = Device.here()
    parts: list[object] = [
        version(),
        torch.__version__,
        core_sources(),
        replace(registry.config, reports=KEPT),  # how many are kept changes no graph
        dry_run,
        device,
        registry.tiers,
        states(registry),
    ]
    parts += [
        (pattern.name, pattern.signature(), _source(pattern.function))
        for _, pattern in sorted(registry.patterns.items())
    ]
    for backend in registry.backends.values():
        parts += [backend.name, backend.distribution, backend.sources, backend.libraries, backend.dialects]
        parts += [declaration(strategy) for strategy in backend.strategies]
        parts += [registry.unavailable(backend.name, kind) for kind in (device, Device("cpu"))]
    parts.append(tuple(map(str, registry.failures)))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def states(registry: Registry) -> str:
    """External state that the readings of dialects depend on, such as another framework's names for process groups.

    Raises:
        BackendError: if the ``state`` of a dialect raises.
    """
    return repr([(dialect.name, _state(dialect)) for dialect in registry.dialects if dialect.state is not None])


def _state(dialect: Dialect) -> str:
    assert dialect.state is not None
    try:
        return repr(dialect.state())
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise BackendError(f"state of dialect {dialect.name!r} raised {described(error)}") from error


def tables(registry: Registry) -> str:
    """Fingerprints of the tuning table for each group size in this process; empty if there are none."""
    sizes = sorted({group.size() for group in groups()})
    if not sizes:
        return ""
    device = Device.here()
    found = {size: registry.table(device, size) for size in sizes}
    known = {size: table.fingerprint for size, table in found.items() if table is not None}
    return repr(known) if known else ""


def declaration(strategy: Strategy) -> tuple[object, ...]:
    """A strategy without the address of its impl, which differs between processes."""
    values = (shown(getattr(strategy, each.name)) for each in fields(strategy) if each.name != "impl")
    return (*values, _source(strategy.impl))


def _source(function: Any) -> str:
    if (schema := schema_of(function)) is not None:
        return str(schema)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    # most strategies of a backend share a few functions and differ in their closures
    return _text(function, name) if code is None else _source_of(code, name)


@functools.cache
def _source_of(code: CodeType, name: str) -> str:
    return _text(code, name)


def _text(code: Any, name: str) -> str:
    try:
        # inspect.getsource looks through all modules for the file first, which takes three times as long
        if isinstance(code, CodeType) and (lines := linecache.getlines(code.co_filename)):
            return "".join(inspect.getblock(lines[code.co_firstlineno - 1 :]))
        return inspect.getsource(code)
    except (OSError, TypeError):
        return name
