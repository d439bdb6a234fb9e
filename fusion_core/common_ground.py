"""What the ranks of a process group have in common, exchanged once per group through its store: no collective.

Ranks must emit the same graphs, and a rank that finds its graph in Inductor's cache never runs the pass. So what they
agree on is part of the cache key: `FusionPass.among` settles it for the groups of one graph before Inductor asks for
the key, on ranks that hit the cache and on those that miss it alike, and the pass then takes nothing else for agreed.
The groups are those that Dynamo's graph names: of its functional collectives, meshes and DTensors. Not all groups of
the process: the stages of a pipeline compile one after another, and would wait for each other.

A pass that Inductor runs by itself has no graph to look at when it is asked for its key. It exchanges while it runs,
and gives no key, which keeps the graph out of the cache on every rank, until its process has settled all its groups.

Whether all took part in time is one atomic write, so that a rank that comes late finds what the others settled. What
follows from the facts is a pure function of them.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from fusion_core.agreement import Agreement, NoAgreement
from fusion_core.facts import CODE, Ground, compare, digest, facts
from fusion_core.groups import is_shared, resolved
from fusion_core.reason import Reason
from fusion_core.registry import Registry
from fusion_core.site import Device

TIMEOUT = 300.0
"""Seconds that ranks wait for the others of their group before they go on unfused."""

ALONE = Ground()
"""Of a group without other ranks."""
UNSETTLED = Ground(
    (
        Reason(
            CODE,
            "nothing is fused: the graph does not show this process group before it is compiled",
            "ranks that agree before they look into the compile cache",
            hint="pass FusionPass().among(group) as Inductor's post_grad_custom_post_pass",
        ),
    )
)
"""Of a group that its ranks were not asked about before the graph was compiled."""


@dataclass(frozen=True)
class Common:
    """What ranks have in common in each group that one graph names.

    Attributes:
        grounds: Name of a group → what its ranks have in common.
        otherwise: The same of groups that have other ranks and are not among them.
    """

    grounds: Mapping[str, Ground] = field(default_factory=dict)
    otherwise: Ground = UNSETTLED
    _registries: dict[str, Registry] = field(default_factory=dict, init=False, repr=False, compare=False)

    def ground(self, group: str) -> Ground:
        """What the ranks of one group have in common."""
        if group in self.grounds:
            return self.grounds[group]
        found = resolved(group)
        return self.otherwise if found is not None and is_shared(found) else ALONE

    def registry(self, whole: Registry, group: str) -> Registry:
        """What of a registry the ranks of a group use."""
        ground = self.ground(group)
        if not ground.reasons:
            return whole
        if group not in self._registries:
            each = dict.fromkeys(whole.backends, ground.whole) if ground.whole else {}
            taken = each or {name: (reason,) for name, reason in ground.backends.items()}
            self._registries[group] = whole.without(taken, ground.table)
        return self._registries[group]

    def unmerged(self, group: str) -> Reason | None:
        """Why all_reduces of a group must not be merged; None where they may be."""
        ground = self.ground(group)
        return ground.whole[0] if ground.whole else ground.merging

    def reasons(self, groups: Iterable[str]) -> dict[str, tuple[Reason, ...]]:
        """What differs between the ranks of some groups, by group; without those where nothing does."""
        return {group: reasons for group in dict.fromkeys(groups) if (reasons := self.ground(group).reasons)}

    @property
    def key(self) -> str:
        """What a compiled graph hangs on, as text; empty where there is nothing to agree on."""
        return repr(sorted(self.grounds.items(), key=lambda item: item[0])) if self.grounds else ""


_settled: WeakKeyDictionary[dist.ProcessGroup, dict[str, Ground]] = WeakKeyDictionary()
_numbers: dict[str, itertools.count[int]] = {}
_lock = threading.RLock()


def _own(registry: Registry, group: dist.ProcessGroup) -> tuple[dict[str, Any], str]:
    """What this process's choices in a group rest on, and a hash of it."""
    device = Device.here()
    if device not in registry.facts:
        given = facts(registry, device)
        registry.facts[device] = {"facts": given, "digest": digest(given)}
    found = registry.found_table(device, group.size())
    table = [None if found.table is None else found.table.fingerprint, found.origin]
    known = registry.facts[device]
    return {**known["facts"], "table": table}, f"{known['digest']} {table}"


def known(registry: Registry) -> Common | None:
    """What is settled already in every group of this process; None where a group with other ranks is not."""
    if not dist.is_available() or not dist.is_initialized():
        return Common()
    found: dict[str, Ground] = {}
    for group in list(dist.distributed_c10d._world.pg_map):
        if is_shared(group):
            ground = _known(registry, group)
            if ground is None:
                return None
            found[str(group.group_name)] = ground
    return Common(found)


def _known(registry: Registry, group: dist.ProcessGroup) -> Ground | None:
    settled = _settled.get(group)
    return settled.get(_own(registry, group)[1]) if settled else None


def so_far(names: Iterable[str], registry: Registry) -> Common:
    """What is settled already, the rest presumed to be in common: for a dry run, which waits for nobody."""
    groups = {name: group for name in names if (group := resolved(name)) is not None and is_shared(group)}
    found = {name: ground for name, group in groups.items() if (ground := _known(registry, group)) is not None}
    return Common(found, ALONE)


def agree(names: Iterable[str], registry: Registry) -> Common:
    """Have the ranks of these groups settle what they have in common; waits for them `TIMEOUT` seconds at most.

    Every rank of a group must call this; the groups may come in any order. A group that is settled is not asked again.
    Where ranks differ, a warning says how.
    """
    groups = {name: group for name in names if (group := resolved(name)) is not None and is_shared(group)}
    found = {name: ground for name, group in groups.items() if (ground := _known(registry, group)) is not None}
    if len(found) < len(groups):
        with _lock:  # another thread may have settled a group by now
            _settle({name: group for name, group in groups.items() if _known(registry, group) is None}, registry)
            found = {name: _settled[group][_own(registry, group)[1]] for name, group in groups.items()}
    return Common(found)


def _settle(groups: Mapping[str, dist.ProcessGroup], registry: Registry) -> None:
    """Publish in all groups before any rank is waited for: the order of groups is each rank's own."""
    end = time.monotonic() + TIMEOUT
    open_: list[tuple[str, dist.ProcessGroup, str, Agreement | Reason]] = []
    for name, group in groups.items():
        own, key = _own(registry, group)
        open_.append((name, group, key, _publish(name, group, own)))
    for name, group, key, agreement in open_:
        ranks = _global_ranks(group)
        outcome = agreement if isinstance(agreement, Reason) else _collect(agreement, end)
        ground = Ground((outcome,)) if isinstance(outcome, Reason) else compare(outcome, ranks)
        _settled.setdefault(group, {})[key] = ground
        for reason in ground.reasons:
            warnings.warn(f"fusion_core: process group {name!r}: {reason}", RuntimeWarning, stacklevel=2)


def _publish(name: str, group: dist.ProcessGroup, own: Mapping[str, Any]) -> Agreement | Reason:
    # never from the start again in this process: a later group of this name may meet in the same store
    number = next(_numbers.setdefault(name, itertools.count()))
    try:
        found = Agreement(group, f"the exchange of facts, step {number}", TIMEOUT, _global_ranks(group))
        found.publish(own)
    except NoAgreement as error:
        return _unfused(error.reason.found, error.reason.needs)
    except (RuntimeError, OSError) as error:
        return _unfused(f"the store of the group fails ({error})", "a store that all ranks reach")
    return found


def _collect(agreement: Agreement, end: float) -> list[Any] | Reason:
    try:
        found = agreement.collect(end)
    except (RuntimeError, OSError, json.JSONDecodeError) as error:
        return _unfused(f"the store of the group fails ({error})", "a store that all ranks reach")
    return _unfused(found.found, "every rank to compile the same graphs") if isinstance(found, Reason) else found


def _unfused(found: str, needs: str) -> Reason:
    return Reason(CODE, f"nothing is fused: {found}", needs)


def _global_ranks(group: dist.ProcessGroup) -> list[int]:
    try:
        return list(dist.get_process_group_ranks(group))
    except (KeyError, RuntimeError, ValueError):
        return list(range(group.size()))
