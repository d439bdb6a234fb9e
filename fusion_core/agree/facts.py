"""The facts that a rank's choices depend on, as plain values that other ranks compare with theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fusion_core.agree.facts_shape import misshapen
from fusion_core.agree.group_store import CODE
from fusion_core.config import PREFIX
from fusion_core.plugins.fingerprint import declaration, version
from fusion_core.plugins.loader import Backend
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.sources import core_sources
from fusion_core.reason import Reason
from fusion_core.site import Device

SAME = "the same on every rank"
_MAY_DIFFER = ("strict", "table", "reports")
"""Fields in which configurations may differ: they change no graph, or what they name is compared instead."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class RankDifferences:
    """The differences between a group's ranks. Whatever is not listed is the same on all of them.

    Attributes:
        whole: Why nothing in the group is fused or merged; empty if something may be.
        backends: Backends that no rank of the group uses → why.
        table: Why no rank of the group uses a tuning table; None if ranks may.
        merging: Why nothing in the group is merged, if only that is ruled out; None if all_reduces may be merged.
    """

    whole: tuple[Reason, ...] = ()
    backends: Mapping[str, Reason] = field(default_factory=dict)
    table: Reason | None = None
    merging: Reason | None = None

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Every difference; if nothing is fused, only the reasons for that."""
        rest = (*self.backends.values(), self.table, self.merging)
        return self.whole or tuple(reason for reason in rest if reason is not None)


def rank_facts(registry: Registry, device: Device) -> dict[str, Any]:
    """The facts that choices of this process depend on, without the tuning table, as plain JSON types."""
    config = registry.config
    devices = dict.fromkeys((device, Device("cpu")))
    loaded = {
        name: _backend(backend, {str(each): registry.unavailable(name, each) for each in devices})
        for name, backend in registry.backends.items()
    }
    failed = {
        failure.backend: {"failure": str(failure.reason)}
        for failure in registry.failures
        if failure.backend not in loaded and (config.order is None or failure.backend in config.order)
    }
    return {
        "fusion_core": f"{version()} ({core_sources()[:12]})",
        "torch": torch.__version__,
        "device": str(device),
        "config": {name: value for name, value in config.to_dict().items() if name not in _MAY_DIFFER},
        "backends": {**failed, **loaded},
    }


def _backend(backend: Backend, unavailable: Mapping[str, tuple[Reason, ...]]) -> dict[str, Any]:
    return {
        "is": backend.distribution,
        "with": backend.libraries,
        "strategies": {strategy.name: _short(declaration(strategy)) for strategy in backend.strategies},
        "sources": backend.sources[:12],
        "reads": bool(backend.dialects or backend.patterns),
        "unavailable": {device: [str(reason) for reason in reasons] for device, reasons in unavailable.items()},
    }


def _short(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def digest(given: Facts) -> str:
    """A hash of the facts that ranks compare, without the tuning table: equal on ranks that do not differ."""
    backends = {name: {**entry, "unavailable": _usable(entry)} for name, entry in given["backends"].items()}
    return hashlib.sha256(json.dumps({**given, "backends": backends}, sort_keys=True).encode()).hexdigest()


def compare(ranks: Sequence[Any], names: Sequence[object]) -> RankDifferences:
    """The differences between ranks.

    Args:
        ranks: The facts of each rank: those of `rank_facts`, and ``table``, the table's fingerprint (None for no table)
            and origin. Facts of another release may have any shape.
        names: The names of the ranks in reasons.
    """
    differ = _Comparison(tuple(names))
    nothing = "nothing is fused"
    if whole := [*differ(nothing, [_release(each) for each in ranks])]:  # another release may give other facts
        return RankDifferences(tuple(whole))
    for name, each in zip(names, ranks, strict=True):
        if problem := misshapen(each):
            return RankDifferences(
                (Reason(CODE, f"{nothing}: rank {name} gave facts of another shape ({problem})", SAME),)
            )
    whole += differ(nothing, [each["torch"] for each in ranks], "has torch {}")
    whole += differ(nothing, [each["device"] for each in ranks], "runs on {}")
    for name in dict.fromkeys(name for each in ranks for name in each["config"]):
        values = [_shown(each["config"][name]) if name in each["config"] else "nothing" for each in ranks]
        hint = f"give all ranks one FusionConfig and one {PREFIX}{name.upper()}"
        whole += differ(nothing, values, f"has {name}={{}}", hint)
    taken: dict[str, Reason] = {}
    for name in sorted({name for each in ranks for name in each["backends"]}):
        entries = [each["backends"].get(name) for each in ranks]
        # how a backend reads graphs decides which sites the others' strategies get
        whole += differ.reading(f"{nothing}, as {name} reads graphs", entries)
        if reason := next(differ.using(f"{name} is not used", entries), None):
            taken[name] = reason
    loaded = [any("failure" not in entry for entry in each["backends"].values()) for each in ranks]
    tables = [each["table"] for each in ranks]
    words = [f"has {origin} ({fingerprint[:12]})" if fingerprint else "has none" for fingerprint, origin in tables]
    table = next(differ("no tuning table is used", [fingerprint for fingerprint, _ in tables], words=words), None)
    merging = next(
        differ("nothing is merged", ["a backend" if some else "no backend" for some in loaded], "has {}"), None
    )
    return RankDifferences(tuple(whole), taken, table, merging)


def _release(given: Any) -> str:
    """The release of fusion_core that a rank runs, as a phrase."""
    found = given.get("fusion_core") if isinstance(given, dict) else None
    return f"has fusion_core {found}" if isinstance(found, str) else "does not say which fusion_core it has"


def _shown(value: Any) -> str:
    return "(" + ", ".join(map(repr, value)) + ")" if isinstance(value, list) else repr(value)


@dataclass(frozen=True)
class _Comparison:
    """Finds the first rank whose value differs from that of rank 0."""

    names: tuple[object, ...]

    def __call__(
        self, what: str, values: Sequence[Any], has: str = "{}", hint: str = "", words: Sequence[str] | None = None
    ) -> Iterator[Reason]:
        words = [has.format(value) for value in values] if words is None else words
        for name, value, word in zip(self.names, values, words, strict=True):
            if value != values[0]:
                yield Reason(CODE, f"{what}: rank {name} {word}, rank {self.names[0]} {words[0]}", SAME, hint=hint)
                return

    def reading(self, what: str, entries: Sequence[Any]) -> Iterator[Reason]:
        """The differences in a backend that takes part in reading graphs on some rank."""
        if any(entry is not None and entry.get("reads") for entry in entries):
            yield from self._identity(what, entries)

    def using(self, what: str, entries: Sequence[Any]) -> Iterator[Reason]:
        """The differences in a backend that some rank can use."""
        if any(_usable(entry) for entry in entries):
            yield from self(what, [_usable(entry) for entry in entries], words=[_using(entry) for entry in entries])
            yield from self._identity(what, entries)

    def _identity(self, what: str, entries: Sequence[Any]) -> Iterator[Reason]:
        states = [_loading(entry) for entry in entries]
        yield from self(what, states)
        if len(set(states)) > 1 or not all(entry and "is" in entry for entry in entries):
            return
        for library in entries[0]["with"]:
            versions = [entry["with"].get(library) or "none" for entry in entries]
            yield from self(what, versions, f"has {library} {{}}")
        for strategy in sorted({name for entry in entries for name in entry["strategies"]}):
            declared = [entry["strategies"].get(strategy, "no strategy") for entry in entries]
            yield from self(what, declared, f"declares {strategy} as {{}}")
        yield from self(what, [entry["sources"] for entry in entries], "has the sources {}")


def _loading(entry: Any) -> str:
    """Whether a rank has a backend, and which, as a phrase."""
    if entry is None:
        return "does not have it"
    return f"cannot load it ({entry['failure']})" if "failure" in entry else f"has {entry['is'] or 'it'}"


def _usable(entry: Any) -> list[str]:
    """The devices on which a rank can use a backend."""
    unavailable = {} if entry is None else entry.get("unavailable", {})
    return [device for device, reasons in unavailable.items() if not reasons]


def _using(entry: Any) -> str:
    """Why a rank cannot use a backend, or which one it has, as a phrase."""
    unavailable = {} if entry is None else entry.get("unavailable", {})
    reasons = [f"on {device} ({'; '.join(why)})" for device, why in unavailable.items() if why]
    return f"cannot use it {', '.join(reasons)}" if reasons else _loading(entry)
