"""Asks requirements about a site: at once, by token count, or again at each call.

A graph for any number of tokens is compiled once. A requirement that does not look at run-time sizes is answered then.
One that does is answered for every count: `changes_at` lists exactly the counts at which its answer may change, or it
is asked at each call, about the site of that call. The sizes of the first call never decide: that would add a guard to
the graph, or give another answer on each rank.
"""

from __future__ import annotations

import functools
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
"""The code of a refusal because a requirement raised, or returned neither a Reason nor None."""


def answered(requirement: Requirement, site: Site) -> Reason | None:
    """The reason why a site does not meet a requirement, or None. A requirement is a plugin's code, and may raise."""
    try:
        found: object = requirement.unmet(site)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # sys.exit of a plugin too
        what = f"requirement '{text_of(requirement)}' raised {described(error)}"
        return Reason(FAILED, what, "a Reason or None at any site")
    if found is None or isinstance(found, Reason):
        return found
    what = f"requirement '{text_of(requirement)}' gave {type(found).__name__} {text_of(found)!r}"
    return Reason(FAILED, what, "a Reason or None at any site")


def text_of(value: object) -> str:
    """The text of a requirement, or of what it returned, for a message."""
    return shown(value, str)


class When(Enum):
    """When a requirement is answered."""

    NOW = "now"
    BY_COUNT = "by count"
    EACH_CALL = "each call"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a requirement at a site.

    Attributes:
        when: When it is answered.
        reason: Why it is not met; None if it is met or not answered yet.
        changes: Token counts at which the answer may change, if it is given by count.
    """

    when: When
    reason: Reason | None = None
    changes: tuple[int, ...] = ()


class Answers:
    """The answers of requirements at one site. Each is asked once: a strategy's variants share requirement objects.

    Args:
        site: The site, which may have sizes that are known only at run time.
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        self._known: dict[int, tuple[Requirement, Answer]] = {}

    @functools.cached_property
    def _ahead(self) -> Ahead | None:
        """The site as requirements see it before a call; None if all its sizes are known."""
        return ahead(self.site) if has_run_time_sizes(self.site) else None

    def ask(self, requirement: Requirement) -> Answer:
        """The answer of a requirement."""
        known = self._known.get(id(requirement))
        if known is None:  # keeps the requirement alive, so that no other one can get its id
            known = self._known[id(requirement)] = requirement, self._ask(requirement)
        return known[1]

    def unmet(self, requirements: Iterable[Requirement]) -> tuple[Reason, ...]:
        """Every reason why requirements are not met, as far as it is known before a call."""
        return tuple(reason for each in requirements if (reason := self.ask(each).reason) is not None)

    def _ask(self, requirement: Requirement) -> Answer:
        site, asked = self.site, self._ahead
        if asked is None:
            return Answer(When.NOW, answered(requirement, site))
        watched, watch = asked.watched()
        reason = answered(requirement, watched)
        if watch.looked and reason is not None and reason.code == FAILED:  # as it does if it compares an unknown size
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
    """Token counts at which the answer may change; a reason if the plugin's code raises or returns anything else."""
    changes_at = getattr(requirement, "changes_at", None)
    if changes_at is None:
        return None
    try:
        found = changes_at(site)
        counts = None if found is None else tuple(found)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # sys.exit of a plugin too
        what = f"changes_at of requirement '{text_of(requirement)}' raised {described(error)}"
        return Reason(FAILED, what, "token counts or None")
    if counts is None or all(type(count) is int for count in counts):
        return counts
    what = f"changes_at of requirement '{text_of(requirement)}' gave {text_of(found)}"
    return Reason(FAILED, what, "token counts or None")


def _undetermined(requirement: Requirement, asked: Ahead, watch: Watch) -> Reason | None:
    """Why the sizes that a requirement looked at do not follow from a call's token count; None if they do."""
    looked = watch.symbols | (asked.leading if watch.tokens else set())
    found = f"{text_of(requirement)} depends on a size that is known only at run time"
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
    """Whether the answer may depend on the number of tokens."""
    watched, watch = ahead(any_tokens(site)).watched()
    answered(requirement, watched)  # the answer does not matter, only what it looked at
    return watch.looked


class Terms:
    """The answers of several requirements at a site whose token count is known only at run time.

    Args:
        requirements: The requirements.
        answers: The answers of the site.
    """

    def __init__(self, requirements: Sequence[Requirement], answers: Answers) -> None:
        self._answers = [(each, answers.ask(each)) for each in requirements]

    @property
    def changes(self) -> set[int]:
        """Token counts at which an answer may change."""
        return {count for _, answer in self._answers for count in answer.changes}

    @property
    def each_call(self) -> tuple[int, ...]:
        """The indices of the requirements that each call has to ask."""
        return tuple(place for place, (_, answer) in enumerate(self._answers) if answer.when is When.EACH_CALL)

    def unmet(self, answers: Answers) -> tuple[Reason, ...]:
        """Every reason at a site of fixed size, without those that each call has to ask.

        Args:
            answers: The answers of that site.
        """
        found = (
            answers.ask(each).reason if answer.when is When.BY_COUNT else answer.reason
            for each, answer in self._answers
        )
        return tuple(reason for reason in found if reason is not None)
