"""Backends that are wrong in one way each, and the conformance kit's message for each."""

from __future__ import annotations

from fusion_core.testing import CHECKS, CheckFailed, subjects
from tests.faults.fault import Fault


def observe(backend: str, check: str) -> str:
    """The first line of the kit's message, and whether the message has the command that repeats the failure."""
    (subject,) = subjects("wrong", f"tests.testing.wrong_backends:{backend}", 40)
    (promise,) = [each for each in CHECKS if each.name == check]
    try:
        promise.run(subject)
    except CheckFailed as failed:
        first, *rest = str(failed).splitlines()
        again = any(line.startswith("  again: fusion-core verify wrong --strategy") for line in rest)
        return f"refused: {first}{' (again)' * again}"
    return "right"


def _row(backend: str, check: str, fault: str, words: str, *, slow: bool = False) -> Fault:
    given = {"backend": backend, "check": check}
    return Fault("kit", backend, fault, rf"refused: wrong\.\w+: {words}", given, slow)


SIDES = "refuses_on_the_wrong_side_of_each_requirement"
LARGE = "is_right_at_large_sizes_and_at_its_bounds"
FAKE = "declares_what_the_definition_gives"
AGAIN = r".* \(again\)"

ROWS = (
    _row("accepts_everything", SIDES, "a requirement that lets all pass", "requirement '.*' is not met here" + AGAIN),
    _row("refuses_everything", SIDES, "a requirement that lets nothing pass", ".* is met here and refuses: .*" + AGAIN),
    _row("refuses_without_a_word", SIDES, "a refusal without words", ".* needs a Reason with code and found" + AGAIN),
    _row("has_a_strange_requirement", SIDES, "nobody said its sides", ".* the kit does not know the two sides; .*"),
    _row("contradicts_itself", "accepts_its_own_example", "requirements of which no site meets all", ".*no example.*"),
    _row("has_no_fake", FAKE, "no fake", "it raises on fake tensors: .*" + AGAIN),
    _row("returns_too_little", FAKE, "one result of three", "returns 1 values, needs 3: .*" + AGAIN),
    _row("is_wrong_beyond_1024_rows", LARGE, "wrong in late rows", "normed is wrong in row 1024" + AGAIN, slow=True),
    _row(
        "is_wrong_at_its_most_tokens", LARGE, "wrong at 700, its most", "normed is wrong in row 699" + AGAIN, slow=True
    ),
    _row("is_wrong_at_its_widest", LARGE, "wrong at 5120, its widest", "normed is wrong in row 3" + AGAIN, slow=True),
    _row("is_wrong_at_hidden_16384", LARGE, "wrong where it is wide", "normed is wrong in row 1" + AGAIN, slow=True),
    _row(
        "is_wrong_at_four_ranks",
        "is_right_at_every_world_size",
        "wrong at four ranks alone",
        "normed is wrong in row 3" + AGAIN,
        slow=True,
    ),
    _row(
        "adds_its_own_part_first",
        "gives_the_same_bits_on_every_rank",
        "each rank adds in an order of its own",
        ".* has other bits than on rank 0" + AGAIN,
        slow=True,
    ),
    _row(
        "returns_its_workspace",
        "can_be_repeated_and_used_in_two_groups",
        "a result buffer that the next call uses",
        "call 1 of 6, in turn on two groups: a later call overwrote normed" + AGAIN,
        slow=True,
    ),
    _row(
        "dies_on_one_rank",
        "equals_the_oracle_where_it_accepts",
        "a rank that dies in the kernel",
        "it accepts this site, and a rank raised, died or hung there" + AGAIN,
        slow=True,
    ),
)
