"""The parts of checks: their verdicts, their examples, and runs in workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn, TypeVar

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from fusion_core.errors import FusionError, PatternError
from fusion_core.plugins.requirements import Requirement
from fusion_core.reason import Reason
from fusion_core.samples.requirement_sides import NoSides
from fusion_core.samples.sites import SCALES, Impossible, describe, example_site, with_outputs
from fusion_core.samples.tensors import Values
from fusion_core.site import Device, Site
from fusion_core.testing import jobs, pools
from fusion_core.testing.check import Example, chosen, command, only
from fusion_core.testing.drawing import draw_site, draw_tensors
from fusion_core.testing.jobs import Outcome
from fusion_core.testing.subject import Subject
from fusion_core.workers import WorkerError

T = TypeVar("T")


class CheckFailed(FusionError):
    """A promise that is not kept; the message names the strategy, the site, what was found and what is needed."""


class CheckSkipped(FusionError):
    """A check that cannot run on this machine; the message is the reason."""


class CheckNotApplicable(CheckSkipped):
    """A check that does not apply to this strategy on any machine; the message is the reason."""


class _Stop(BaseException):
    """Ends hypothesis's search at its first failure, if each further failure would cost new workers."""

    def __init__(self, failure: CheckFailed) -> None:
        super().__init__(str(failure))
        self.failure = failure


def fail(subject: Subject, site: Site, found: str, rank: int | None = None, values: Values | None = None) -> NoReturn:
    """Raise `CheckFailed` with everything that an author needs to reproduce the failure."""
    where = "" if rank is None else f"\n  on rank {rank}"
    numbers = "" if values is None else f"\n  with {values}"
    again = f"\n  again: {command(subject, site, values)}"
    raise CheckFailed(f"{subject}: {found}\n  at {describe(site)}{where}{numbers}{again}")


def example(subject: Subject, device: Device, world_size: int = 2) -> Site:
    """A site that the strategy accepts.

    Raises:
        CheckFailed: if there is none.
    """
    try:
        return example_site(subject.pattern, subject.strategy, device=device, world_size=world_size)
    except (Impossible, NoSides, PatternError) as error:
        raise CheckFailed(
            f"{subject}: it accepts no example: {error}\n  needs an ordinary site that meets all it requires"
        ) from None
    except Exception as error:  # from the code of a requirement
        raise CheckFailed(f"{subject}: a requirement raises {error!r}, needs a Reason or None at any site") from error


def asked(subject: Subject, requirement: Requirement, site: Site) -> Reason | None:
    """The reason that a requirement returns for a site; the check fails if it raises."""
    try:
        return requirement.unmet(site)
    except Exception as error:  # noqa: BLE001  # from a plugin's code
        fail(subject, site, f"requirement '{requirement}' raises {error!r}, needs a Reason or None at any site")


def here(subject: Subject) -> tuple[Device, tuple[int, ...]]:
    """A device of this machine that runs the strategy, and the world sizes to test, the usual one first.

    Raises:
        CheckSkipped: if there is none, with the reasons.
    """
    reasons = []
    for device in dict.fromkeys((Device.here(), Device("cpu"))):
        sizes = pools.world_sizes(subject, device.type)
        wanted = example(subject, device, sizes[0] if sizes else 2)
        if why := subject.registry.unavailable(subject.backend, device):
            reasons.append(f"on {device}: {'; '.join(map(str, why))}")
        elif wanted.device != device:
            reasons.append(f"on {device}: it needs {wanted.device}")
        elif not sizes:
            reasons.append(
                f"on {device}: this machine has {pools.most_ranks(device.type)}, it needs {wanted.world_size}"
            )
        else:
            return device, sizes
    raise CheckSkipped(f"{subject} cannot run here; {'; '.join(reasons)}")


def refused(subject: Subject, site: Site) -> bool:
    """Whether the strategy refuses a site; the check fails if a reason is empty."""
    reasons = subject.strategy.cannot(site, subject.pattern)
    for reason in reasons:
        if not (reason.code and reason.found):
            fail(subject, site, f"it refuses by {reason!r}, needs a code and what was found")
    return bool(reasons)


def run(subject: Subject, site: Site, job: Callable[..., T], *args: Any) -> list[T]:
    """The results of a job on every rank.

    Raises:
        CheckFailed: if a rank raises, dies or hangs; the cause is a `WorkerError`.
    """
    try:
        return pools.run(site, job, subject, *args)
    except WorkerError as error:
        values = next((value for value in args if isinstance(value, Values)), None)
        numbers = "" if values is None else f"\n  with {values}"
        raise CheckFailed(
            f"{subject}: it accepts this site, and a rank raised, died or hung there; needs a requirement that refuses "
            f"it, or a fix\n  at {describe(site)}{numbers}\n  again: {command(subject, site, values)}\n{error}"
        ) from error


def judge(subject: Subject, site: Site, values: Values, outcomes: Sequence[Outcome], where: str = "") -> None:
    """Fail if any rank has a result of the wrong form or with an error above its bound."""
    for rank, outcome in enumerate(outcomes):
        if outcome.problems:
            fail(subject, site, f"{where}{'; '.join(outcome.problems)}", rank, values)
        for each in outcome.excesses:
            if not each.ok:
                found = (
                    f"{where}{each.output} is wrong in row {each.row}: off the float64 oracle by {each.error:.3g}, "
                    f"needs at most {each.bound:.3g}, which the definition's own error allows "
                    "(see fusion_core.testing.tolerance)"
                )
                fail(subject, site, found, rank, values)


def compare_each(subject: Subject, fixed: Iterable[Example]) -> None:
    """Compare those fixed examples with the oracle that the strategy does not refuse."""
    for one in chosen(fixed):
        compare(subject, one)


def compare(subject: Subject, one: Example) -> None:
    """Compare an example with the oracle, unless the strategy refuses it."""
    site, values = one[0], Values() if one[1] is None else one[1]
    if not refused(subject, site):
        judge(subject, site, values, run(subject, site, jobs.compare, values))


def in_float32(subject: Subject, site: Site) -> Site:
    """The site with all tensors in float32 if the strategy accepts that, else unchanged."""
    inputs = {n: meta if n in SCALES else replace(meta, dtype=torch.float32) for n, meta in site.inputs.items()}
    try:
        found = with_outputs(subject.pattern, replace(site, inputs=inputs), site.outputs)
    except Impossible:
        return site
    return site if subject_refuses(subject, found) else found


def sites(
    subject: Subject, device: Device, world_sizes: Sequence[int] = (2,), *, accepted: bool | None = None
) -> st.SearchStrategy[Site]:
    """Sites on both sides of the strategy's requirements."""
    return draw_site(
        subject.pattern, subject.strategy, device=device, world_sizes=tuple(world_sizes), accepted=accepted
    ).filter(lambda site: (site.device == device and site.world_size in world_sizes) or subject_refuses(subject, site))


def subject_refuses(subject: Subject, site: Site) -> bool:
    """Whether a site needs no workers, because the strategy refuses it."""
    return bool(subject.strategy.cannot(site, subject.pattern))


def examples(subject: Subject, device: Device, world_sizes: Sequence[int]) -> st.SearchStrategy[tuple[Site, Values]]:
    """Sites with the values of their tensors."""
    return sites(subject, device, world_sizes).flatmap(lambda site: st.tuples(st.just(site), draw_tensors(site)))


def for_all(subject: Subject, check: Callable[[T], None], drawn: st.SearchStrategy[T], factor: float = 1.0) -> None:
    """Check generated examples, and shrink one that fails.

    Args:
        subject: Its ``examples`` is their number; if that is None, hypothesis's profile decides.
        check: Raises `CheckFailed`.
        drawn: The examples.
        factor: Multiplies their number; at least 5 are checked.
    """
    if only() is not None:
        return
    number = hypothesis.settings().max_examples if subject.examples is None else subject.examples

    @hypothesis.settings(
        max_examples=max(round(number * factor), 5),
        deadline=None,  # a first call may build kernels
        database=None,  # the message is enough to reproduce a failure
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(drawn)
    def holds(one: T) -> None:
        try:
            check(one)
        except CheckFailed as failure:
            if isinstance(failure.__cause__, WorkerError):
                raise _Stop(failure) from failure.__cause__
            raise

    try:
        holds()
    except _Stop as stop:
        raise stop.failure from None
    except NoSides as error:
        raise CheckFailed(f"{subject}: {error}") from None
