import threading
import time

import pytest
import torch.distributed as dist

from fusion_core.agree.agreement import Agreement, NoAgreement
from fusion_core.reason import Reason
from fusion_core.workers import WorkerPool

OUT_OF_MEMORY = Reason("memory", "no memory is left", "more memory")

# What follows runs in the workers.


def agreement(subject, timeout=20.0):
    return Agreement(dist.group.WORLD, subject, timeout)


def gathered():
    ours = agreement("values")
    return [ours.gather({"rank": dist.get_rank()}), ours.bcast(dist.get_rank(), root=1), ours.barrier()]


def outcomes(failing):
    ours, found = agreement(f"the outcome {failing}"), []
    for _ in range(2):
        found.append(ours.outcome(OUT_OF_MEMORY if dist.get_rank() in failing else None))
        failing = ()
    return found


def one_leaves():
    ours, start = agreement("one leaves"), time.monotonic()
    if dist.get_rank() == 1:
        ours.abandon(OUT_OF_MEMORY)
        return "left"
    with pytest.raises(NoAgreement) as caught:
        ours.gather(None)
    assert time.monotonic() - start < 10
    return str(caught.value.reason)


def one_is_late():
    """The others have settled the outcome when it comes: it must not come to another one."""
    dist.barrier()  # so that the time limit counts from one moment
    ours = agreement("late", 2)
    if dist.get_rank() == 0:
        dist.barrier()
        return str(ours.outcome(None))
    found = str(ours.outcome(None))
    dist.barrier()
    return found


def one_never_comes():
    dist.barrier()
    ours = agreement("never", 2)
    if dist.get_rank() == 2:
        dist.barrier()
        return ""
    with pytest.raises(NoAgreement) as caught:
        ours.gather(None)
    dist.barrier()
    return str(caught.value.reason)


def other_threads_can_use_the_store():
    """One that waits must not hold the store: NCCL's own threads talk through it."""
    dist.barrier()
    group = dist.group.WORLD
    store = dist.distributed_c10d._get_process_group_store(group)
    if dist.get_rank() == 1:
        time.sleep(4)
    waiting = threading.Thread(target=agreement("threads").gather, args=(None,))
    waiting.start()
    start = time.monotonic()
    store.set(f"mine {dist.get_rank()}", "1")
    took = time.monotonic() - start
    waiting.join()
    return took


# What follows runs in the parent.


@pytest.fixture(scope="module")
def three():
    with WorkerPool(3) as pool:
        yield pool


def test_every_rank_gets_the_values_of_all(three):
    assert three.run(gathered) == [[[{"rank": 0}, {"rank": 1}, {"rank": 2}], 1, None]] * 3


def test_no_failure_is_an_agreement(three):
    assert three.run(outcomes, ()) == [[None, None]] * 3


@pytest.mark.parametrize("failing", [(1,), (0, 2), (0, 1, 2)])
def test_a_failure_of_any_rank_is_one_outcome_for_all(three, failing):
    first, *others = three.run(outcomes, failing)
    assert others == [first, first]
    reason, next_step = first
    assert reason.found in [f"rank {rank}: no memory is left" for rank in failing]
    assert next_step is None, "a later step is not what an earlier one was"


def test_a_rank_that_leaves_is_not_waited_for(three):
    reason = "rank 1: no memory is left, needs more memory"
    assert three.run(one_leaves) == [reason, "left", reason]


def test_a_late_rank_comes_to_the_same_outcome(three):
    found = three.run(one_is_late)
    assert len(set(found)) == 1
    assert found[0].startswith("rank 0 did not take part in late within 0:00:02")


def test_a_rank_that_never_comes_is_named(three):
    first, second, _ = three.run(one_never_comes)
    assert first == second
    assert first.startswith("rank 2 did not take part in never")


def test_waiting_leaves_the_store_to_others(three):
    assert max(three.run(other_threads_can_use_the_store)) < 3


def test_a_destroyed_group_is_named():
    class Gone:
        group_name = "tp"

        def rank(self):
            return 0

        def size(self):
            return 2

    with pytest.raises(NoAgreement, match="the process group 'tp' is destroyed"):
        Agreement(Gone(), "a thing", 1)


def test_a_failure_is_settled_before_the_others_can_see_that_all_are_here(monkeypatch):
    class Two:
        group_name = "tp"

        def rank(self):
            return 0

        def size(self):
            return 2

    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_process_group_store", lambda group: store)
    ours = Agreement(Two(), "a thing", 1)
    real = ours._store

    class Watched:
        """The other rank, which came first, looks whenever anything is written."""

        def set(self, key, value):
            real.set(key, value)
            if real.check(["1/0", "1/1"]):
                real.compare_set("1/decision", "", "agreed")

        def __getattr__(self, name):
            return getattr(real, name)

    real.set("1/1", b"here")
    ours._store = Watched()
    reason = ours.outcome(Reason("memory", "no memory is left"))
    assert reason is not None
    assert reason.found == "rank 0: no memory is left"
