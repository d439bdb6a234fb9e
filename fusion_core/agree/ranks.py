"""What the ranks of a process group have in common, exchanged once per group through its store: no collective.

Ranks must emit the same graphs, and a rank that finds its graph in Inductor's cache never runs the pass. So what they
agree on is part of the cache key: `FusionPass.among` settles it for the groups of one graph before Inductor asks for
the key, on ranks that hit the cache and on those that miss it alike, and the pass then takes nothing else for agreed.
The groups that are waited for are those that Dynamo's graph names: of its functional collectives, meshes and DTensors.
Not all groups of the process: the stages of a pipeline compile one after another, and would wait for each other. But
what this process rests on is published in all of them at once, since it does not depend on a graph: a rank that asks in
another group first, or a thread of it, finds the facts there.

A pass that Inductor runs by itself has no graph to look at when it is asked for its key. It exchanges while it runs,
and gives no key, which keeps the graph out of the cache on every rank, until its process has settled all its groups.

Whether all took part in time is one atomic write, so that a rank that comes late finds what the others settled, as does
one that was interrupted and asks again. What follows from the facts is a pure function of them. No lock is held while
a rank is waited for.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch.distributed as dist

from fusion_core.agree.exchange import Exchange
from fusion_core.agree.facts import Ground, compare, digest, facts
from fusion_core.agree.group_store import CODE, NoAgreement, group_store
from fusion_core.agree.kernel_calls import calls_of
from fusion_core.groups import global_ranks, is_shared, resolved
from fusion_core.plugins.registry import Registry
from fusion_core.reason import Reason
from fusion_core.site import Device
from fusion_core.tables.store import Found, find

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
_exchanges: WeakKeyDictionary[dist.ProcessGroup, Exchange] = WeakKeyDictionary()
_registries: WeakValueDictionary[int, Registry] = WeakValueDictionary()
_lock = threading.Lock()


def will_ask(registry: Registry) -> None:
    """Have the other ranks told of this registry while this one is stuck with another one: they may wait for it."""
    _registries[id(registry)] = registry


def _own(registry: Registry, group: dist.ProcessGroup) -> tuple[dict[str, Any], str]:
    """What this process's choices in a group rest on, and a hash of it."""
    device = Device.here()
    return _facts(registry, device, registry.found_table(device, group.size()))


def _facts(registry: Registry, device: Device, found: Found) -> tuple[dict[str, Any], str]:
    if device not in registry.facts:
        given = facts(registry, device)
        registry.facts[device] = {"facts": given, "digest": digest(given)}
    known = registry.facts[device]
    fingerprint = None if found.table is None else found.table.fingerprint
    hash_ = hashlib.sha256(f"{known['digest']} {fingerprint}".encode()).hexdigest()
    return {**known["facts"], "table": [fingerprint, found.origin]}, hash_


def _groups() -> list[dist.ProcessGroup]:
    """The groups of this process that have other ranks."""
    if not dist.is_available() or not dist.is_initialized():
        return []
    return [group for group in list(dist.distributed_c10d._world.pg_map) if is_shared(group)]


def known(registry: Registry) -> Common | None:
    """What is settled already in every group of this process; None where a group with other ranks is not."""
    found: dict[str, Ground] = {}
    for group in _groups():
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

    Every rank of a group must call this, in any order of groups and registries. A group that is settled is not asked
    again. Where ranks differ, a warning says how.

    Raises:
        NoAgreement: where the store of a group fails once the other ranks know this one's facts, or this process is a
            fork of the one that made the group.
        RanksDiffer: where ranks that wait for one another may be inside kernels that were agreed on before.
    """
    will_ask(registry)
    groups = {name: group for name in names if (group := resolved(name)) is not None and is_shared(group)}
    found = {name: _known(registry, group) for name, group in groups.items()}
    missing = [name for name, ground in found.items() if ground is None]
    if missing:
        found |= _settle({name: groups[name] for name in missing}, registry)
    return Common({name: ground for name, ground in found.items() if ground is not None})


def _settle(groups: Mapping[str, dist.ProcessGroup], registry: Registry) -> dict[str, Ground]:
    """Publish in all groups before any rank is waited for: the order of groups is each rank's own."""
    end = time.monotonic() + TIMEOUT
    waiting: list[tuple[str, dist.ProcessGroup, str, Exchange | Reason]] = []
    for name, group in groups.items():
        own, hash_ = _own(registry, group)
        waiting.append((name, group, hash_, _published(group, own, hash_)))
    _publish_everywhere(registry)
    found = {}
    for name, group, hash_, exchange in waiting:
        outcome = exchange if isinstance(exchange, Reason) else exchange.settle(hash_, end, TIMEOUT, _stuck)
        if isinstance(outcome, Reason):
            if (running := calls_of(name)) is not None and (error := running.may_be_inside(outcome)) is not None:
                raise error
            ground = Ground((Reason(CODE, f"nothing is fused: {outcome.found}", outcome.needs),))
        else:
            ground = Ground() if outcome is None else compare(outcome, global_ranks(group))
        found[name] = _keep(name, group, hash_, ground)
    return found


def _published(group: dist.ProcessGroup, own: Mapping[str, Any], hash_: str) -> Exchange | Reason:
    """The exchange of a group, in which all ranks can see these facts; why they cannot, and never will."""
    try:
        exchange = _exchange(group)
        if exchange is None:
            return Reason(CODE, f"the process group {group.group_name!r} has no store", "a group made with one")
        exchange.publish(hash_, own)
    except NoAgreement as error:
        if error.reason.code != CODE:
            raise
        return error.reason
    return exchange


def _exchange(group: dist.ProcessGroup) -> Exchange | None:
    store = group_store(group)
    with _lock:
        if store is not None and group not in _exchanges:
            _exchanges[group] = Exchange(store, global_ranks(group))
        return _exchanges.get(group)


def _publish_everywhere(*registries: Registry) -> None:
    """Tell the ranks of every group what this one has, so that they need not wait until it comes to their group.

    Threads, and ranks that compile their models in another order, would else wait for each other. Whatever keeps
    something from being published is said where it is asked for.
    """
    device = Device.here()
    for group in _groups():
        for registry in registries:
            with suppress(Exception):
                table = find(device, group.size(), registry.config.table)
                own, hash_ = _facts(registry, device, table)
                # never after this rank went on without the others
                if not table.problems and hash_ not in _settled.get(group, {}):
                    _published(group, own, hash_)


def _stuck() -> None:
    """Tell of registries too that were not asked for yet: the other ranks may wait for one of them."""
    _publish_everywhere(*list(_registries.values()))


def _keep(name: str, group: dist.ProcessGroup, hash_: str, ground: Ground) -> Ground:
    with _lock:
        kept = _settled.setdefault(group, {})
        if hash_ in kept:  # another thread was first, and has said so
            return kept[hash_]
        kept[hash_] = ground
    for reason in ground.reasons:
        warnings.warn(f"fusion_core: process group {name!r}: {reason}", RuntimeWarning, stacklevel=2)
    return ground


def _in_a_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_in_a_fork)
