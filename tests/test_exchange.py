"""Ranks settle by the hash of their facts, in whatever order they ask; here they share one store in one process."""

import threading
import time

import pytest
import torch.distributed as dist

from fusion_core.agree import group_store
from fusion_core.agree.exchange import Exchange, Line
from fusion_core.agree.facts_shape import misshapen
from fusion_core.agree.group_store import NoAgreement
from fusion_core.reason import Reason


class Group:
    def __init__(self, rank, size, name="tp"):
        self.group_name = name
        self._rank, self._size = rank, size

    def rank(self):
        return self._rank

    def size(self):
        return self._size


@pytest.fixture
def store(monkeypatch):
    found = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_process_group_store", lambda group: found)
    return found


def exchanges(size):
    """One for each rank, with the groups, which a store is kept for only as long as they live."""
    groups = [Group(rank, size) for rank in range(size)]
    return groups, [Exchange(group_store.group_store(group), range(size)) for group in groups]


def settle(exchange, hash_, limit=20.0):
    exchange.publish(hash_, f"facts of {hash_}")
    return exchange.settle(hash_, time.monotonic() + limit, limit)


def all_settle(pairs, limit=20.0):
    found = {}

    def one(index, exchange, hash_):
        found[index] = settle(exchange, hash_, limit)

    threads = [threading.Thread(target=one, args=(index, *pair)) for index, pair in enumerate(pairs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[index] for index in range(len(pairs))]


def test_what_another_rank_has_published_need_not_be_asked_for(store):
    _, (here, there) = exchanges(2)
    there.publish("a", "facts of a")
    assert settle(here, "a", 0.0) is None
    assert settle(there, "a", 0.0) is None


def test_ranks_that_wait_with_others_differ_at_once_and_for_good(store):
    _, (here, there) = exchanges(2)
    wanted = ["facts of a", "facts of b"]
    start = time.monotonic()
    assert all_settle([(here, "a"), (there, "b")]) == [wanted, wanted]
    assert time.monotonic() - start < 10
    assert settle(here, "b", 0.0) == settle(there, "a", 0.0) == wanted, "each hash has one outcome, on all ranks"


def test_a_rank_that_waits_with_others_is_not_taken_for_one_that_has_the_same(store):
    """It has published the same for another model: what it waits with in this group decides."""
    _, (here, there) = exchanges(2)
    there.publish("a", "facts of a")
    waiting = threading.Thread(target=settle, args=(there, "b"))
    waiting.start()
    while not store.check(["fusion_core/tp/1/the exchange of facts/asked/1"]):
        time.sleep(0.001)
    assert settle(here, "a") == ["facts of a", "facts of b"]
    waiting.join()


def test_a_rank_that_never_comes_is_named_to_all_and_shifts_nothing(store):
    _, (here, there) = exchanges(2)
    first = settle(here, "a", 0.1)
    assert isinstance(first, Reason)
    assert first.found.startswith("rank 1 did not take part in the exchange of facts within 0:00:00.1")
    assert settle(there, "a") == first
    assert all_settle([(here, "b"), (there, "b")]) == [None, None]


def test_three_ranks_of_which_one_differs(store):
    _, (one, two, three) = exchanges(3)
    wanted = ["facts of a", "facts of b", "facts of a"]
    assert all_settle([(one, "a"), (two, "b"), (three, "a")]) == [wanted] * 3


@pytest.mark.parametrize(
    "text", ["{no", "[]", '{"hashes": 1}', '{"hashes": [1, 2]}', '{"hashes": ["a"]}', "[" * 100_000]
)
def test_a_line_of_another_release_settles_nothing(text):
    assert Line.of(text.encode(), 2) == Line((), None)


def test_a_line_is_what_was_written():
    line = Line(("a", None), Reason("agreement", "rank 1 did not come", "all"))
    assert Line.of(str(line).encode(), 2) == line


def test_a_later_group_of_a_name_does_not_read_what_an_earlier_one_wrote(store):
    groups, (here, there) = exchanges(2)
    assert all_settle([(here, "a"), (there, "a")]) == [None, None]
    later, (here, there) = exchanges(2)
    assert isinstance(settle(here, "a", 0.0), Reason), "the other rank's facts are of the earlier group"
    assert isinstance(settle(there, "a", 0.0), Reason)
    del groups, later


def test_ranks_meet_in_a_later_group_where_one_of_them_missed_the_earlier(store):
    first = Group(0, 2)
    group_store.group_store(first).set("left", "behind")
    here, there = Group(0, 2), Group(1, 2)
    group_store.group_store(here).set("key", "value")
    assert group_store.group_store(there).get("key") == b"value"
    assert group_store.group_store(there).get("left") is None
    assert group_store.group_store(first).get("left") == b"behind"


def test_a_store_that_fails_is_a_named_error(store):
    class Broken:
        def check(self, keys):
            raise dist.DistNetworkError("gone")

    ours = group_store.group_store(Group(0, 2))
    ours._store = Broken()
    with pytest.raises(NoAgreement, match=r"the store of the group fails \(gone\), needs a store that all ranks reach"):
        ours.get("key")


FACTS = {"torch": "2", "device": "cpu", "config": {}, "backends": {}, "table": [None, ""]}
LOADED = {
    "is": "a 1",
    "with": {"b": None},
    "strategies": {},
    "sources": "s",
    "reads": False,
    "unavailable": {"cpu": []},
}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (FACTS, ""),
        ({**FACTS, "more": 1}, ""),
        ({**FACTS, "backends": {"a": LOADED, "b": {"failure": "no"}}}, ""),
        (None, "is NoneType, needs names with values"),
        ({**FACTS, "torch": 2}, "torch is int, needs text"),
        ({name: value for name, value in FACTS.items() if name != "config"}, "config is missing"),
        ({**FACTS, "table": [None]}, "table has 1 values, needs 2"),
        ({**FACTS, "table": [3, ""]}, "table is int, needs text"),
        ({**FACTS, "backends": {"b": {"failure": 1}}}, "backends b: failure is int, needs text"),
        ({**FACTS, "backends": {"a": {**LOADED, "reads": 1}}}, "backends a: reads is int, needs true or false"),
        ({**FACTS, "backends": {"a": {**LOADED, "with": {"b": 1}}}}, "backends a: with b: is int, needs text"),
        ({**FACTS, "backends": {"a": {**LOADED, "unavailable": {"cpu": ""}}}}, "is str, needs a list"),
    ],
)
def test_facts_of_another_shape_are_said(given, problem):
    assert misshapen(given).endswith(problem)
    assert bool(misshapen(given)) == bool(problem)
