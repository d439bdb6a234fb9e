"""The agreement between the ranks of a process group, reached once per group through its store: no collective.

Ranks must emit the same graphs, and a rank that finds its graph in Inductor's cache never runs the pass. The agreement
is therefore part of the cache key. `FusionPass.among` reaches it for a graph's groups before Inductor asks for the key,
so ranks that hit the cache take part too. The pass uses only what was agreed there.

A rank waits for the groups that Dynamo's graph names: those of its functional collectives, meshes and DTensors. It does
not wait for other groups of the process: the stages of a pipeline compile one after another, and would wait for each
other. The facts of this process are published in all its groups at once, since they do not depend on a graph. So a rank
or a thread that needs another group first finds them there.

A pass that Inductor runs by itself has no graph when Inductor asks for its key. It agrees while it runs. Until its
process has agreed in all its groups it returns no key, which keeps the graph out of the cache on every rank.

Whether all ranks took part in time is one atomic write. A late rank finds the others' outcome, and so does a rank that
was interrupted and tries again. The differences are a pure function of the facts. No lock is held while a rank is
waited for.
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

from fusion_core._torch.distributed import groups
from fusion_core.agree.exchange import Exchange
from fusion_core.agree.facts import RankDifferences, compare, digest, rank_facts
from fusion_core.agree.group_store import CODE, NoAgreement, group_store
from fusion_core.agree.kernel_calls import calls_of
from fusion_core.groups import global_ranks, is_shared, resolved
from fusion_core.plugins.registry import Registry
from fusion_core.reason import Reason
from fusion_core.site import Device
from fusion_core.tables.store import Found, find

TIMEOUT = 300.0
"""Seconds that ranks wait for the others of their group before they go on unfused."""

ALONE = RankDifferences()
"""For a group without other ranks."""
UNSETTLED = RankDifferences(
    (
        Reason(
            CODE,
            "nothing is fused: the graph does not show this process group before it is compiled",
            "ranks that agree before they look into the compile cache",
            hint="pass FusionPass().among(group) as Inductor's post_grad_custom_post_pass",
        ),
    )
)
"""For a group whose ranks have not agreed before the graph was compiled."""


@dataclass(frozen=True)
class AgreedState:
    """The agreement in each group that a graph names.

    Attributes:
        differences_of: Name of a group → the differences between its ranks.
        otherwise: The differences in any other group that has other ranks.
    """

    differences_of: Mapping[str, RankDifferences] = field(default_factory=dict)
    otherwise: RankDifferences = UNSETTLED
    _registries: dict[str, Registry] = field(default_factory=dict, init=False, repr=False, compare=False)

    def differences(self, group: str) -> RankDifferences:
        """The differences between the ranks of one group."""
        if group in self.differences_of:
            return self.differences_of[group]
        found = resolved(group)
        return self.otherwise if found is not None and is_shared(found) else ALONE

    def registry(self, whole: Registry, group: str) -> Registry:
        """The part of a registry that the ranks of a group use."""
        differences = self.differences(group)
        if not differences.reasons:
            return whole
        if group not in self._registries:
            each = dict.fromkeys(whole.backends, differences.whole) if differences.whole else {}
            taken = each or {name: (reason,) for name, reason in differences.backends.items()}
            self._registries[group] = whole.without(taken, differences.table)
        return self._registries[group]

    def unmerged(self, group: str) -> Reason | None:
        """The reason why all_reduces of a group must not be merged, or None."""
        differences = self.differences(group)
        return differences.whole[0] if differences.whole else differences.merging

    def reasons(self, groups: Iterable[str]) -> dict[str, tuple[Reason, ...]]:
        """The differences between the ranks of some groups, by group; groups without any are left out."""
        return {group: reasons for group in dict.fromkeys(groups) if (reasons := self.differences(group).reasons)}

    @property
    def key(self) -> str:
        """The agreement that a compiled graph depends on, as text; empty if there is nothing to agree on."""
        return repr(sorted(self.differences_of.items(), key=lambda item: item[0])) if self.differences_of else ""


_settled: WeakKeyDictionary[dist.ProcessGroup, dict[str, RankDifferences]] = WeakKeyDictionary()
_exchanges: WeakKeyDictionary[dist.ProcessGroup, Exchange] = WeakKeyDictionary()
_registries: WeakValueDictionary[int, Registry] = WeakValueDictionary()
_local: WeakKeyDictionary[Registry, dict[Device, tuple[dict[str, Any], str]]] = WeakKeyDictionary()
"""The facts of a registry on a device, and their digest."""
_lock = threading.Lock()


def will_ask(registry: Registry) -> None:
    """Have the facts of this registry published too while this rank waits: other ranks may wait for them."""
    _registries[id(registry)] = registry


def _local_facts(registry: Registry, group: dist.ProcessGroup) -> tuple[dict[str, Any], str]:
    """The facts that this process's choices in a group depend on, and their hash."""
    device = Device.here()
    return _facts(registry, device, registry.found_table(device, group.size()))


def _facts(registry: Registry, device: Device, found: Found) -> tuple[dict[str, Any], str]:
    by_device = _local.setdefault(registry, {})
    if device not in by_device:
        own = rank_facts(registry, device)
        by_device[device] = own, digest(own)
    given, words = by_device[device]
    fingerprint = None if found.table is None else found.table.fingerprint
    hash_ = hashlib.sha256(f"{words} {fingerprint}".encode()).hexdigest()
    return {**given, "table": [fingerprint, found.origin]}, hash_


def _groups() -> list[dist.ProcessGroup]:
    """The groups of this process that have other ranks."""
    return [group for group in groups() if is_shared(group)]


def settled_everywhere(registry: Registry) -> AgreedState | None:
    """The agreement in every group of this process; None if a group with other ranks has not agreed yet."""
    found: dict[str, RankDifferences] = {}
    for group in _groups():
        differences = _cached(registry, group)
        if differences is None:
            return None
        found[str(group.group_name)] = differences
    return AgreedState(found)


def _cached(registry: Registry, group: dist.ProcessGroup) -> RankDifferences | None:
    settled = _settled.get(group)
    return settled.get(_local_facts(registry, group)[1]) if settled else None


def settled_so_far(names: Iterable[str], registry: Registry) -> AgreedState:
    """The agreements so far, for a dry run, which does not wait. Other groups count as having no differences."""
    groups = {name: group for name in names if (group := resolved(name)) is not None and is_shared(group)}
    found = {
        name: differences for name, group in groups.items() if (differences := _cached(registry, group)) is not None
    }
    return AgreedState(found, ALONE)


def agree(names: Iterable[str], registry: Registry) -> AgreedState:
    """Agree with the other ranks of these groups; waits for them for at most `TIMEOUT` seconds.

    Every rank of a group must call this, in any order of groups and registries. A group that has agreed is not asked
    again. If ranks differ, a warning names the differences.

    Raises:
        NoAgreement: if the store of a group fails once the other ranks have this one's facts, or this process is a fork
            of the one that created the group.
        RanksDiffer: if ranks that wait for one another may be inside kernels that were agreed on before.
    """
    will_ask(registry)
    groups = {name: group for name in names if (group := resolved(name)) is not None and is_shared(group)}
    found = {name: _cached(registry, group) for name, group in groups.items()}
    missing = [name for name, differences in found.items() if differences is None]
    if missing:
        found |= _settle({name: groups[name] for name in missing}, registry)
    return AgreedState({name: differences for name, differences in found.items() if differences is not None})


def _settle(groups: Mapping[str, dist.ProcessGroup], registry: Registry) -> dict[str, RankDifferences]:
    """Publish in all groups, then wait for their ranks: each rank may have the groups in another order."""
    end = time.monotonic() + TIMEOUT
    waiting: list[tuple[str, dist.ProcessGroup, str, Exchange | Reason]] = []
    for name, group in groups.items():
        own, hash_ = _local_facts(registry, group)
        waiting.append((name, group, hash_, _published(group, own, hash_)))
    _publish_everywhere(registry)
    found = {}
    for name, group, hash_, exchange in waiting:
        outcome = exchange if isinstance(exchange, Reason) else exchange.settle(hash_, end, TIMEOUT, _stuck)
        if isinstance(outcome, Reason):
            if (running := calls_of(name)) is not None and (error := running.may_be_inside(outcome)) is not None:
                raise error
            differences = RankDifferences((Reason(CODE, f"nothing is fused: {outcome.found}", outcome.needs),))
        else:
            differences = RankDifferences() if outcome is None else compare(outcome, global_ranks(group))
        found[name] = _keep(name, group, hash_, differences)
    return found


def _published(group: dist.ProcessGroup, own: Mapping[str, Any], hash_: str) -> Exchange | Reason:
    """The exchange of a group with these facts published, or the reason why they never will be."""
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
    """Publish this rank's facts in every group, so that other ranks need not wait until it needs that group.

    Otherwise threads, and ranks that compile their models in another order, would wait for each other. A failure to
    publish is reported where the facts are needed.
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
    """Publish the facts of registries that are not needed here yet: other ranks may wait for one of them."""
    _publish_everywhere(*list(_registries.values()))


def _keep(name: str, group: dist.ProcessGroup, hash_: str, differences: RankDifferences) -> RankDifferences:
    with _lock:
        kept = _settled.setdefault(group, {})
        if hash_ in kept:  # another thread was first, and has warned
            return kept[hash_]
        kept[hash_] = differences
    for reason in differences.reasons:
        warnings.warn(f"fusion_core: process group {name!r}: {reason}", RuntimeWarning, stacklevel=2)
    return differences


def _in_a_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_in_a_fork)
