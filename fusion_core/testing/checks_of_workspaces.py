"""A promise of backends whose kernels need memory that ranks share: they go on without it, all ranks alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fusion_core.samples.tensors import Values
from fusion_core.site import Site
from fusion_core.testing import faulty, pools
from fusion_core.testing.check import check, chosen
from fusion_core.testing.checking import CheckFailed, CheckNotApplicable, example, fail, here, judge, run
from fusion_core.testing.faulty import Fault, Seen
from fusion_core.testing.subject import Subject
from fusion_core.workers import WorkerError
from fusion_core.workspaces.lifecycle import workspaces_of

ANYWHERE = (
    (
        Fault("create", "raises", "last"),
        Fault("run", "raises", "all"),
        Fault("run", "is wrong", "last"),
        Fault("create", "is late", "last"),
    ),
)
"""Faults, those together that leave workers of use for the next one."""
ON_A_CPU = (
    (Fault("run", "raises", "last"),),
    (Fault("run", "is late", "last"),),
)
"""On a GPU a kernel that some ranks do not run holds the others' for ever, and the GPU with them."""
DEATHS = (Fault("create", "dies", "last"), Fault("run", "dies", "last"))
"""On a CPU too: over NCCL, torch's own all_reduce waits for a rank that has died."""


@check(needs_device=True)
def goes_on_where_a_workspace_fails(subject: Subject) -> None:
    """Where making a workspace or checking its kernel fails on a rank, all ranks are right without it, and say why."""
    device, sizes = here(subject)
    ((site, _),) = chosen([(example(subject, device, max(sizes[:2])), None)])
    if (why := _elsewhere(subject, site)) is not None:
        raise CheckNotApplicable(f"{subject} {why}")
    values = Values(seed=4)
    for faults in (*ANYWHERE, *(ON_A_CPU if site.device.type == "cpu" else ())):
        for fault, seen in zip(faults, _seen(subject, site, values, faults), strict=True):
            _judge(subject, site, values, fault, seen)
    for fault in DEATHS if site.device.type == "cpu" and site.world_size > 1 else ():
        _survive(subject, site, values, fault)


def _judge(subject: Subject, site: Site, values: Values, fault: Fault, seen: Sequence[Seen]) -> None:
    judge(subject, site, values, [outcome for each in seen for outcome in each.outcomes], f"where {fault}: ")
    if len({each.reasons for each in seen}) > 1:
        told = "; ".join(f"rank {rank}: {', '.join(each.reasons)}" for rank, each in enumerate(seen))
        fail(subject, site, f"where {fault}, ranks give different reasons ({told}), needs one for all of them")
    if not seen[0].reasons:
        fail(subject, site, f"where {fault}, no reason is reported, needs the operator to run unfused, and fell_back")


def _survive(subject: Subject, site: Site, values: Values, fault: Fault) -> None:
    """Fail if a rank neither raises nor is right, in time, where another one's process ends."""
    limit = faulty.MOST_SECONDS_AFTER_A_DEATH
    with pools.new_pool(site.world_size, site.device.type, faulty.MOST_SECONDS) as pool:
        by_rank = pool.run_each(faulty.where_a_rank_dies, subject, site, values, fault, timeout=limit)
    for rank, calls in enumerate(by_rank):
        if isinstance(calls, WorkerError):
            if rank == site.world_size - 1:  # the one that dies
                continue
            needs = "needs an error or a reason to run unfused on each rank that is left"
            raise CheckFailed(
                f"{subject}: where {fault}, another one hung, died or failed; {needs}\n{calls}"
            ) from calls
        for number, each in enumerate(calls, 1):
            if each.off > 1:
                found = (
                    f"where {fault}, call {number} gives results {each.off:.3g} times as far from float64 as allowed"
                )
                fail(subject, site, f"{found}, needs an error or the sum of all ranks", rank, values)


def _seen(subject: Subject, site: Site, values: Values, faults: Sequence[Fault]) -> Iterator[Sequence[Seen]]:
    """What each rank sees of each fault, in workers of their own: some faults leave processes of no more use."""
    with pools.new_pool(site.world_size, site.device.type, faulty.MOST_SECONDS) as pool:
        for fault in faults:
            try:
                yield pool.run(faulty.without_workspace, subject, site, values, fault)
            except WorkerError as error:
                raise CheckFailed(f"{subject}: where {fault}, a rank raised, died or hung\n{error}") from error


_first: dict[str, str] = {}
"""Backend → the strategy that its workspaces were looked at with: they are the same for all of its strategies."""


def _elsewhere(subject: Subject, site: Site) -> str | None:
    """Why this strategy is not the one to look at."""
    if (first := _first.get(subject.backend, subject.name)) != subject.name:
        return f"has the workspaces of {first}, which are looked at there"
    if not workspaces_of(subject.backend) or not any(run(subject, site, faulty.makes_a_workspace, Values(seed=4))):
        return "makes no workspace of fusion_core.workspaces"
    _first[subject.backend] = subject.name
    return None
