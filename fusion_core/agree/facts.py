"""What a rank's choices rest on, as plain values that other ranks can compare with theirs."""

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
"""Fields in which configurations may differ: they change no graph, or name what is compared itself."""

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Ground:
    """What the ranks of a group have in common, told by what they have not.

    Attributes:
        whole: Why nothing is fused in the group and nothing merged; empty where something may be.
        backends: Backends that no rank uses there → why.
        table: Why no rank uses a tuning table there.
        merging: Why nothing is merged there, where that is all.
    """

    whole: tuple[Reason, ...] = ()
    backends: Mapping[str, Reason] = field(default_factory=dict)
    table: Reason | None = None
    merging: Reason | None = None

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Every difference; where nothing is fused, the rest matters no more."""
        rest = (*self.backends.values(), self.table, self.merging)
        return self.whole or tuple(reason for reason in rest if reason is not None)


def facts(registry: Registry, device: Device) -> dict[str, Any]:
    """All that choices of this process rest on but the tuning table, as plain JSON types."""
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
    """A hash of all in facts that ranks compare, but the tuning table: equal where nothing differs."""
    backends = {name: {**entry, "unavailable": _usable(entry)} for name, entry in given["backends"].items()}
    return hashlib.sha256(json.dumps({**given, "backends": backends}, sort_keys=True).encode()).hexdigest()


def compare(ranks: Sequence[Any], names: Sequence[object]) -> Ground:
    """What ranks have in common.

    Args:
        ranks: The facts of each rank, with its ``table`` beside those of `facts`: fingerprint, None for no table, and
            where it comes from. Those of another release may be anything.
        names: What to call the ranks in reasons.
    """
    differ = _Comparison(tuple(names))
    nothing = "nothing is fused"
    if whole := [*differ(nothing, [_release(each) for each in ranks])]:  # another release may give other facts
        return Ground(tuple(whole))
    for name, each in zip(names, ranks, strict=True):
        if problem := misshapen(each):
            return Ground((Reason(CODE, f"{nothing}: rank {name} gave facts of another shape ({problem})", SAME),))
    whole += differ(nothing, [each["torch"] for each in ranks], "has torch {}")
    whole += differ(nothing, [each["device"] for each in ranks], "runs on {}")
    for name in dict.fromkeys(name for each in ranks for name in each["config"]):
        values = [_said(each["config"][name]) if name in each["config"] else "nothing" for each in ranks]
        hint = f"give all ranks one FusionConfig and one {PREFIX}{name.upper()}"
        whole += differ(nothing, values, f"has {name}={{}}", hint)
    taken: dict[str, Reason] = {}
    for name in sorted({name for each in ranks for name in each["backends"]}):
        entries = [each["backends"].get(name) for each in ranks]
        # whatever changes how graphs are read changes where others' strategies stand
        whole += differ.reading(f"{nothing}, as {name} reads graphs", entries)
        if reason := next(differ.using(f"{name} is not used", entries), None):
            taken[name] = reason
    loaded = [any("failure" not in entry for entry in each["backends"].values()) for each in ranks]
    tables = [each["table"] for each in ranks]
    said = [f"has {origin} ({print_[:12]})" if print_ else "has none" for print_, origin in tables]
    table = next(differ("no tuning table is used", [print_ for print_, _ in tables], said=said), None)
    merging = next(
        differ("nothing is merged", ["a backend" if some else "no backend" for some in loaded], "has {}"), None
    )
    return Ground(tuple(whole), taken, table, merging)


def _release(given: Any) -> str:
    """What a rank says that it runs."""
    found = given.get("fusion_core") if isinstance(given, dict) else None
    return f"has fusion_core {found}" if isinstance(found, str) else "does not say which fusion_core it has"


def _said(value: Any) -> str:
    return "(" + ", ".join(map(repr, value)) + ")" if isinstance(value, list) else repr(value)


@dataclass(frozen=True)
class _Comparison:
    """Says where ranks differ: the first one that has something else than the first of all."""

    names: tuple[object, ...]

    def __call__(
        self, what: str, values: Sequence[Any], has: str = "{}", hint: str = "", said: Sequence[str] | None = None
    ) -> Iterator[Reason]:
        words = [has.format(value) for value in values] if said is None else said
        for name, value, word in zip(self.names, values, words, strict=True):
            if value != values[0]:
                yield Reason(CODE, f"{what}: rank {name} {word}, rank {self.names[0]} {words[0]}", SAME, hint=hint)
                return

    def reading(self, what: str, entries: Sequence[Any]) -> Iterator[Reason]:
        """A backend that some rank reads graphs by, and that others do not have or have otherwise."""
        if any(entry is not None and entry.get("reads") for entry in entries):
            yield from self._identity(what, entries)

    def using(self, what: str, entries: Sequence[Any]) -> Iterator[Reason]:
        """A backend that some rank can use, and that others cannot or have otherwise."""
        if any(_usable(entry) for entry in entries):
            yield from self(what, [_usable(entry) for entry in entries], said=[_using(entry) for entry in entries])
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
    """What a rank has of a backend."""
    if entry is None:
        return "does not have it"
    return f"cannot load it ({entry['failure']})" if "failure" in entry else f"has {entry['is'] or 'it'}"


def _usable(entry: Any) -> list[str]:
    """The devices that a rank can use a backend on."""
    unavailable = {} if entry is None else entry.get("unavailable", {})
    return [device for device, reasons in unavailable.items() if not reasons]


def _using(entry: Any) -> str:
    """What keeps a rank from using a backend, or what it has."""
    unavailable = {} if entry is None else entry.get("unavailable", {})
    reasons = [f"on {device} ({'; '.join(why)})" for device, why in unavailable.items() if why]
    return f"cannot use it {', '.join(reasons)}" if reasons else _loading(entry)
