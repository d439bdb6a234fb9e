"""Two real ranks that differ, are interrupted, lose their store or read the facts of another release."""

from __future__ import annotations

from typing import Any

from fusion_core.workers import WorkerPool
from tests.faults import rank_jobs
from tests.faults.fault import Fault

FIXTURES = ("two_ranks",)

SOON = 20.0
"""Seconds within which every row ends, even on a busy machine."""


def observe(job: str, two_ranks: WorkerPool, **given: Any) -> str:
    """The verdict of both ranks, or that of each if they differ."""
    found = two_ranks.run(rank_jobs.run, job, **given, timeout=90.0)
    if (seconds := max(seconds for _, seconds in found)) > SOON:
        return f"late: {seconds:.0f} s"
    (first, _), (second, _) = found
    return first if first == second else f"{first} || {second}"


def _row(name: str, fault: str, expected: str, job: str, *, slow: bool = False, **given: Any) -> Fault:
    return Fault("ranks", name, fault, expected, {"job": job, **given}, slow)


def _foreign(name: str, facts: str, problem: str) -> Fault:
    expected = rf"unfused: nothing is fused: rank 1 {problem}.*"
    return _row(f"facts: {name}", f"rank 1 gives facts of another shape: {name}", expected, "foreign", facts=facts)


ABSENT = r"unfused: nothing is fused: rank {} did not take part in the exchange of facts within 0:00:0.*"
LOST = r"the store of the group fails \(connection reset\), needs a store that all ranks reach"
SHAPE = r"gave facts of another shape \({}"

ROWS = (
    _row("order: one configuration", "models compiled in opposite orders", "right", "opposite", registries=1),
    _row("order: two configurations", "the same, each model with its own", "right", "opposite", registries=2),
    _row("threads: two", "threads in two groups, in opposite orders", "right", "threads", number=2),
    _row("threads: four", "threads in four groups, in opposite orders", "right", "threads", number=4),
    _row(
        "configuration: on one rank",
        "rank 0 alone takes a new configuration, then both another",
        ABSENT.format(1) + r" \|\| right",
        "alone",
        slow=True,
    ),
    _row("late: facts", "rank 1 comes after the limit", ABSENT.format(1), "too_late", slow=True),
    _row("Ctrl-C: again", "interrupted while it waits, and tried again", "right", "interrupted", again="the same"),
    _row(
        "Ctrl-C: another first", "and then another one first", "right", "interrupted", again="another first", slow=True
    ),
    _row(
        "Ctrl-C: never again",
        "and not tried again",
        "right",
        "interrupted",
        again="never",
        slow=True,
    ),
    _row(
        "Ctrl-C: in a thread",
        "an exception set in the thread that waits",
        "right",
        "interrupted",
        again="the same",
        by_thread=True,
        slow=True,
    ),
    *(
        _row(
            f"Ctrl-C: {step}",
            f"interrupted in a vote's {step}, and taken again",
            "right",
            "step_interrupted",
            step=step,
        )
        for step in ("outcome", "gather", "collect")
    ),
    _row(
        "store: before facts",
        "rank 1's connection fails before it publishes",
        ABSENT.format(1) + r" \|\| unfused: nothing is fused: " + LOST,
        "store_fails",
        at="set",
        key="facts/",
        slow=True,
    ),
    *(
        _row(
            f"store: {at} of {key}",
            "rank 1's connection fails when its facts are published",
            r"right \|\| error: NoAgreement: " + LOST,
            "store_fails",
            at=at,
            key=key,
            slow=slow,
        )
        for at, key, slow in (("get", "log/", False), ("get", "asked/", True))
    ),
    _row(
        "vote: store before",
        "rank 1's connection fails before the others see it",
        r"unfused: rank 1 did not take part in a vote .* \|\| unfused: " + LOST,
        "vote_fails",
        at="set",
        key="1/1",
        slow=True,
    ),
    _row(
        "vote: store after",
        "rank 1's connection fails when the others have seen it",
        r"right \|\| error: NoAgreement: " + LOST,
        "vote_fails",
        at="check",
        key="decision",
    ),
    _row(
        "vote: store and failure",
        "rank 1 has a failure, and its connection fails when it has said so",
        "unfused: rank 1: no memory is left",
        "vote_fails",
        at="set",
        key="1/1",
        failure=True,
    ),
    *(
        _row(
            f"no store: {what}",
            "no rank of the group has one",
            f"{word}: .*has no store, needs .*",
            "no_store",
            what=what,
        )
        for what, word in (
            ("facts", "unfused"),
            ("outcome", "unfused"),
            ("collect", "unfused"),
            ("gather", "error: NoAgreement"),
        )
    ),
    _foreign("no JSON", "'{no'", "does not say which fusion_core it has"),
    _foreign("a list", "[1, 2]", "does not say which fusion_core it has"),
    _foreign("another release", "{'fusion_core': '9', 'backends': 7}", "has fusion_core 9, rank 0 has fusion_core "),
    _foreign(
        "a missing name", "{k: v for k, v in ours.items() if k != 'backends'}", SHAPE.format("backends is missing")
    ),
    _foreign("another type", "{**ours, 'config': 3}", SHAPE.format("config is int")),
    _foreign(
        "a setting more", "{**ours, 'config': {**ours['config'], 'new': 1}}", "has limit=9, rank 0 has limit=None"
    ),
    _foreign("a backend", "{**ours, 'backends': {'a': {'is': 1}}}", SHAPE.format("backends a: ")),
    _foreign("a table", "{**ours, 'table': 'none'}", SHAPE.format("table is str")),
    _row("log: no JSON", "another release has written in the log", "right", "written", key="log/0", text="{no"),
    _row("log: other", "the same, of another shape", "right", "written", key="log/0", text='{"hashes": [1]}'),
    _row("waiting: other", "what rank 1 waits with is of another shape", "right", "written", key="asked/1", text="{}"),
    _row(
        "gather: no pickle",
        "rank 1 gives what cannot be read",
        r"error: NoAgreement: what rank 1 gave in a vote cannot be read .*",
        "step_spoilt",
        step="gather",
    ),
    _row("collect: no JSON", "the same", "unfused: rank 1 gave what is no JSON, .*", "step_spoilt", step="collect"),
    _row("outcome: no JSON", "the same", "unfused: a rank gave a reason that .*", "step_spoilt", step="outcome"),
    _row(
        "vote: late",
        "rank 1 comes after the limit",
        "unfused: rank 1 did not .*",
        "vote_late",
        step="outcome",
        slow=True,
    ),
    _row("gather: late", "the same", "error: NoAgreement: rank 1 did not .*", "vote_late", step="gather", slow=True),
    _row("vote: left", "rank 1 leaves", r"error: NoAgreement: rank 1: no memory is left \|\| right", "vote_left"),
    _row("vote: of one rank", "rank 0 votes alone, then both", "right", "numbers"),
)
