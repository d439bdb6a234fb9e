"""The jobs of two ranks for the rows of `ranks`: each returns a verdict and how long it took."""

from __future__ import annotations

import _thread
import ctypes
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist

from fusion_core import Reason, Registry
from fusion_core.agree import exchange
from fusion_core.agree import ranks as common_ground
from fusion_core.agree.agreement import Agreement, NoAgreement
from fusion_core.agree.exchange import Exchange
from fusion_core.agree.group_store import GroupStore, group_store
from fusion_core.agree.ranks import agree
from tests.odd_registries import of

LIMIT = 3.0
"""Seconds that ranks wait for each other in rows where one does not come."""
LONG = 60.0
"""The same in rows where no rank may have to wait that long."""
Verdict = tuple[str, float]


def run(name: str, **given: Any) -> Verdict:
    """Run one job by name: this rank's verdict, and the seconds since both ranks began."""
    job = globals()[name]
    groups = [dist.new_group() for _ in range(4)]
    dist.barrier()
    start = time.monotonic()
    with mock.patch.object(common_ground.warnings, "warn"):
        try:
            verdict = job(dist.get_rank(), groups, **given)
        except NoAgreement as error:
            verdict = f"error: NoAgreement: {error}"
    seconds = time.monotonic() - start
    dist.barrier()
    return verdict, seconds


def of_group(group: dist.ProcessGroup, registry: Registry) -> str:
    """The agreement of a group's ranks, as a verdict."""
    reasons = agree([group.group_name], registry).reasons([group.group_name])
    return f"unfused: {reasons[group.group_name][0]}" if reasons else "right"


def vote(outcome: Reason | None) -> str:
    return "right" if outcome is None else f"unfused: {outcome}"


def both(verdicts: list[str]) -> str:
    return " | ".join(dict.fromkeys(verdicts))


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    with mock.patch.object(common_ground, "TIMEOUT", seconds):
        yield


# ---- the order in which ranks ask


def opposite(rank: int, groups: list[Any], registries: int) -> str:
    """Two models in two groups, with one configuration or two, in opposite orders on the two ranks."""
    made = [of(), of(limit=7)]
    for registry in made:
        common_ground.will_ask(registry)
    pairs = [(groups[index], made[index % registries]) for index in (0, 1)]
    # with one configuration, the facts are published at once, not only when a rank is stuck
    with limit(LONG), mock.patch.object(exchange, "MOMENT", LONG if registries == 1 else exchange.MOMENT):
        return both([of_group(*pair) for pair in (pairs if rank == 0 else reversed(pairs))])


def threads(rank: int, groups: list[Any], number: int) -> str:
    """Threads that each use a different group, and start in opposite orders on the two ranks."""
    found: dict[int, str] = {}
    registry = of()

    def one(index: int) -> None:
        found[index] = of_group(groups[index], registry)

    working = [threading.Thread(target=one, args=(index,)) for index in range(number)]
    with limit(LONG):
        for thread in working if rank == 0 else reversed(working):
            thread.start()
            time.sleep(0.1)
        for thread in working:
            thread.join()
    return both([found[index] for index in range(number)])


def alone(rank: int, groups: list[Any]) -> str:
    """Rank 0 uses a new configuration and rank 1 does not; that must not shift what both use later."""
    with limit(LIMIT):
        first = of_group(groups[0], of(limit=1))
        new = of_group(groups[0], of(limit=2)) if rank == 0 else ""
        dist.barrier()
        last = of_group(groups[0], of(limit=3))
        return (
            both([each for each in (new or first, last if rank == 1 else "") if each]) if first == last else "shifted"
        )


def too_late(rank: int, groups: list[Any]) -> str:
    """Rank 1 comes after rank 0 has given up."""
    with limit(1.0):
        if rank == 1:
            time.sleep(2.0)
        return of_group(groups[0], of())


# ---- interrupts


def interrupted_call(call: Callable[[], Any], by_thread: bool) -> bool:
    """Call in this thread or in another one, and raise KeyboardInterrupt there while it waits."""
    if not by_thread:
        # SIGINT is ignored in processes that a shell started in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, _thread.interrupt_main).start()
        try:
            call()
        except KeyboardInterrupt:
            return True
        return False
    caught = []

    def work() -> None:
        try:
            call()
        except KeyboardInterrupt:
            caught.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt))
    thread.join()
    return bool(caught)


def interrupted(rank: int, groups: list[Any], again: str, by_thread: bool = False) -> str:
    """Rank 0 is interrupted while it waits. Then it tries again, tries another configuration first, or gives up."""
    registry = of(limit=1)
    with limit(LIMIT if again == "never" else LONG):
        if rank == 0:
            assert interrupted_call(lambda: of_group(groups[0], registry), by_thread)
            dist.barrier()
            if again == "never":
                return "right"
            other = of_group(groups[0], of(limit=2)) if again == "another first" else "right"
            return both([other, of_group(groups[0], registry)])
        dist.barrier()
        verdicts = [of_group(groups[0], registry)] if again == "never" else []
        if again == "another first":
            verdicts.append(of_group(groups[0], of(limit=2)))
        return both([*verdicts, of_group(groups[0], registry)] if again != "never" else verdicts)


def step_interrupted(rank: int, groups: list[Any], step: str) -> str:
    """A vote for a workspace: rank 0 is interrupted in a step, repeats it, and takes another one."""
    ours = Agreement(groups[0], f"a {step}", LONG)

    def take() -> Any:
        if step == "outcome":
            return ours.outcome(None)
        if step == "gather":
            return ours.gather("first")
        ours.publish("first")
        return ours.collect()

    if rank == 0:
        assert interrupted_call(take, False)
    dist.barrier()
    found = [take(), take()]
    wanted = None if step == "outcome" else ["first", "first"]
    return "right" if found == [wanted, wanted] else f"other: {found}"


# ---- stores that fail


@contextmanager
def failing(at: str, key: str) -> Iterator[None]:
    """Make this rank's store fail from the first call of method ``at`` with a key that contains ``key``."""
    broken = []
    ask = GroupStore._ask

    def wrapped(name: str) -> Any:
        real = getattr(GroupStore, name)

        def call(self: GroupStore, keys: Any, *args: Any) -> Any:
            if broken or (name == at and key in str(keys)):
                broken.append(True)

                def question() -> Any:
                    raise dist.DistNetworkError("connection reset")

                return ask(self, question)
            return real(self, keys, *args)

        return call

    names = ("set", "check", "get", "compare_set")
    with mock.patch.multiple(GroupStore, **{name: wrapped(name) for name in names}):
        yield


def store_fails(rank: int, groups: list[Any], at: str, key: str) -> str:
    """Rank 1's connection fails in the exchange of facts."""
    group_store(groups[0])
    with limit(LIMIT):
        if rank == 0:
            time.sleep(0.5 if key == "asked/" else 0.0)  # rank 1 has to wait
            return of_group(groups[0], of())
        with failing(at, key):
            return of_group(groups[0], of())


def vote_fails(rank: int, groups: list[Any], at: str, key: str, failure: bool = False) -> str:
    """Rank 1's connection fails in a vote."""
    ours = Agreement(groups[0], "a vote", LIMIT)
    problem = Reason("memory", "no memory is left") if failure and rank == 1 else None
    if rank == 0:
        return vote(ours.outcome(None))
    with failing(at, key):
        return vote(ours.outcome(problem))


def no_store(rank: int, groups: list[Any], what: str) -> str:
    """No rank of the group has a store."""
    with mock.patch.object(dist.distributed_c10d, "_get_process_group_store", return_value=None):
        if what == "facts":
            return of_group(groups[0], of())
        ours = Agreement(groups[0], "a vote", LONG)
        if what == "outcome":
            return vote(ours.outcome(None))
        if what == "collect":
            ours.publish(1)
            found = ours.collect()
            assert isinstance(found, Reason)
            return vote(found)
        ours.gather(1)
    return "agreed without a store"


# ---- facts of other releases


def foreign(rank: int, groups: list[Any], facts: str) -> str:
    """Rank 1 publishes these facts: an expression over ``ours``, the facts of this release."""
    publish = Exchange.publish

    def published(self: Exchange, hash_: str, given: Any) -> None:
        changed = eval(facts, {"json": json, "ours": given})
        self._store.set(f"facts/{self._rank}/foreign", changed if isinstance(changed, str) else json.dumps(changed))
        publish(self, hash_, given)

    with limit(LIMIT):
        if rank == 0:
            return of_group(groups[0], of())
        settle = Exchange.settle
        with (
            mock.patch.object(Exchange, "publish", published),
            mock.patch.object(Exchange, "settle", lambda self, hash_, *rest: settle(self, "foreign", *rest)),
        ):
            # also published under its own hash: only the hash that it waits with differs
            return of_group(groups[0], of(limit=9))


def written(rank: int, groups: list[Any], key: str, text: str) -> str:
    """Another release has written this text under a key of the exchange."""
    store = group_store(groups[0])
    assert store is not None
    store.part("the exchange of facts").set(key, text)
    dist.barrier()
    with limit(LIMIT):
        return of_group(groups[0], of())


def step_spoilt(rank: int, groups: list[Any], step: str) -> str:
    """Rank 1 publishes something unreadable in a vote."""
    ours = Agreement(groups[0], "a vote", LIMIT)
    store = ours._store
    assert store is not None
    if rank == 1:
        store.set("1/1", b"\x80no pickle" if step == "gather" else "{no JSON")
    if step == "outcome":
        if rank == 1:
            store.set("1/decision", "{no JSON")
        dist.barrier()
        return vote(ours.outcome(None))
    if step == "gather":
        return "right" if ours.gather(1) is None else "read"
    ours.publish(1)
    found = ours.collect()
    return vote(found) if isinstance(found, Reason) else "read"


# ---- votes


def vote_late(rank: int, groups: list[Any], step: str) -> str:
    """Rank 1 comes after rank 0 has given up, and finds the settled outcome."""
    ours = Agreement(groups[0], "a vote", 1.0)
    if rank == 1:
        time.sleep(2.0)
    if step == "gather":
        ours.gather(1)
        return "right"
    return vote(ours.outcome(None))


def vote_left(rank: int, groups: list[Any]) -> str:
    """Rank 1 abandons an exchange of several steps."""
    ours = Agreement(groups[0], "handles", LONG)
    ours.gather(1)
    if rank == 1:
        ours.abandon(Reason("memory", "no memory is left"))
        return "right"
    ours.gather(2)
    return "right"


def numbers(rank: int, groups: list[Any]) -> str:
    """Rank 0 votes on something on which rank 1 never votes; that must not shift later votes of both."""
    if rank == 0:
        vote(Agreement(groups[0], "what one rank needs", 1.0).outcome(None))
    return vote(Agreement(groups[0], "what both need", LIMIT).outcome(None))
