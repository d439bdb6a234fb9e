"""Asking requirements of a site: at once, by token counts, or again at each call.

A graph for any number of tokens is compiled once. A requirement that does not look at sizes known only at run time is
answered then. One that does is answered for every count: `changes_at` says exactly where its answer may change, or it
is asked at each call, of the site that the call has. It is never answered by the sizes of the first call, which would
add a guard to the graph, or another answer on each rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from fusion_core.errors import described, shown
from fusion_core.plugins.requirements import Requirement
from fusion_core.reason import Reason
from fusion_core.site import Site
from fusion_core.site.run_time import Ahead, ahead, any_tokens, has_run_time_sizes
from fusion_core.site.watched import Watch

RUN_TIME = "run_time_size"
"""The code of a refusal because of a size that is known only at run time."""


FAILED = "requirement"
"""The code of a refusal because a requirement raised, or gave what is no answer."""


def answered(requirement: Requirement, site: Site) -> Reason | None:
    """Why a site does not meet a requirement. Its code is a plugin's: that it raised is a reason too."""
    try:
        found: object = requirement.unmet(site)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # sys.exit of a plugin too
        what = f"requirement '{said(requirement)}' raised {described(error)}"
        return Reason(FAILED, what, "a Reason or None at any site")
    if found is None or isinstance(found, Reason):
        return found
    what = f"requirement '{said(requirement)}' gave {type(found).__name__} {said(found)!r}"
    return Reason(FAILED, what, "a Reason or None at any site")


def said(value: object) -> str:
    """What a requirement, or what it gave, is called in a message."""
    return shown(value, str)


class When(Enum):
    """When a requirement is answered."""

    NOW = "now"
    BY_COUNT = "by count"
    EACH_CALL = "each call"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a requirement says of a site.

    Attributes:
        when: When it is answered.
        reason: Why it is not met; None where it is met, or not answered yet.
        changes: Token counts at which the answer may change, where it is given by count.
    """

    when: When
    reason: Reason | None = None
    changes: tuple[int, ...] = ()


def ask(requirement: Requirement, site: Site) -> Answer:
    """Ask a requirement of a site, which may have sizes that are known only at run time."""
    if not has_run_time_sizes(site):
        return Answer(When.NOW, answered(requirement, site))
    asked = ahead(site)
    watched, watch = asked.watched()
    reason = answered(requirement, watched)
    if watch.looked and reason is not None and reason.code == FAILED:  # as it does where it compares an unknown size
        reason = None
    if reason is not None or not watch.looked:
        return Answer(When.NOW, reason)
    changes = _changes(requirement, site) if site.tokens is None else None
    if isinstance(changes, Reason):
        return Answer(When.NOW, changes)
    if changes is not None:
        return Answer(When.BY_COUNT, changes=changes)
    unknown = _undetermined(requirement, asked, watch)
    return Answer(When.EACH_CALL) if unknown is None else Answer(When.NOW, unknown)


def _changes(requirement: Requirement, site: Site) -> tuple[int, ...] | Reason | None:
    """Token counts at which the answer may change; a reason where the plugin's code raises, or gives something else."""
    changes_at = getattr(requirement, "changes_at", None)
    if changes_at is None:
        return None
    try:
        found = changes_at(site)
        counts = None if found is None else tuple(found)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # sys.exit of a plugin too
        what = f"changes_at of requirement '{said(requirement)}' raised {described(error)}"
        return Reason(FAILED, what, "token counts or None")
    if counts is None or all(type(count) is int for count in counts):
        return counts
    what = f"changes_at of requirement '{said(requirement)}' gave {said(found)}"
    return Reason(FAILED, what, "token counts or None")


def _undetermined(requirement: Requirement, asked: Ahead, watch: Watch) -> Reason | None:
    """Why what a requirement looked at does not follow from the token count of a call; None where it does."""
    looked = watch.symbols | (asked.leading if watch.tokens else set())
    found = f"{said(requirement)} depends on a size that is known only at run time"
    if looked & asked.unbacked:
        hint = "fusion_core.Tokens(most=..., least=...) states a limit on the token count for such graphs"
        return Reason(RUN_TIME, f"{found}, from data", "a size that the graph's inputs have", hint=hint)
    if not watch.symbols or watch.symbols == {asked.lead}:
        return None
    if watch.symbols <= asked.leading:
        hint = "a requirement on Site.tokens or fusion_core.Tokens"
        return Reason(RUN_TIME, f"{found}, one of several of x", "one on the number of tokens alone", hint=hint)
    hint = "torch._dynamo.mark_static marks it static"
    return Reason(RUN_TIME, f"{found}, and is no token count", "a fixed size", hint=hint)


def looks_at_tokens(requirement: Requirement, site: Site) -> bool:
    """Whether the answer may be another for another number of tokens."""
    watched, watch = ahead(any_tokens(site)).watched()
    answered(requirement, watched)  # what it looked at counts, not what came of it
    return watch.looked


def unmet(requirements: Iterable[Requirement], site: Site) -> tuple[Reason, ...]:
    """Every reason why requirements are not met, as far as it is known before a call."""
    return tuple(reason for each in requirements if (reason := ask(each, site).reason) is not None)


class Terms:
    """What several requirements say of a site whose token count is known only at run time.

    Args:
        requirements: The requirements.
        site: The site.
    """

    def __init__(self, requirements: Sequence[Requirement], site: Site) -> None:
        self._answers = [(each, ask(each, site)) for each in requirements]

    @property
    def changes(self) -> set[int]:
        """Token counts at which an answer may change."""
        return {count for _, answer in self._answers for count in answer.changes}

    @property
    def each_call(self) -> tuple[int, ...]:
        """The places of those that each call has to ask."""
        return tuple(place for place, (_, answer) in enumerate(self._answers) if answer.when is When.EACH_CALL)

    def unmet(self, site: Site) -> tuple[Reason, ...]:
        """Every reason at a site of fixed size, without those that each call has to ask."""
        found = (
            answered(each, site) if answer.when is When.BY_COUNT else answer.reason for each, answer in self._answers
        )
        return tuple(reason for reason in found if reason is not None)
