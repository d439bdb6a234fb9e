"""A plugin's requirements that are wrong, or that depend on the token count, in one graph for all token counts."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from fusion_core import (
    Contiguous,
    FusionConfig,
    MultipleOf,
    Reason,
    Registry,
    Site,
    SizeBetween,
    Stage,
    Strategy,
    Tokens,
)
from tests import test_token_rules, token_counts
from tests.faults.fault import Fault
from tests.support.graphs import REFERENCE, fuse

FIXTURES = ("one_rank", "tmp_path", "monkeypatch")
NAMES = {"Tokens": Tokens, "SizeBetween": SizeBetween, "MultipleOf": MultipleOf, "Contiguous": Contiguous}
COUNTS = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 66, 100, 300)


@dataclass(frozen=True)
class Written:
    """A requirement whose ``unmet`` is an expression over ``s``, the site; a false value is no reason."""

    expression: str

    def unmet(self, s: Site) -> Any:
        """The expression's value: True if the requirement is met, False if not; any other value is returned as is."""
        found = eval(self.expression, {"s": s, "x": s.inputs["x"], "Reason": Reason, "sys": sys, "unknown": _unknown})
        return {True: None, False: Reason("rule", "not met")}.get(found, found) if isinstance(found, bool) else found

    def __str__(self) -> str:
        return self.expression


def _unknown(size: Any) -> bool:
    """A check that catches whatever a comparison raises."""
    try:
        return bool(size > 5)
    except Exception:  # noqa: BLE001  # as careless plugins do
        return True


def observe(
    how: str,
    requires: str,
    tmp_path: Path,
    monkeypatch: Any,
    one_rank: None,
    counts: Sequence[int] = COUNTS,
    expected: str = "",
    **config: Any,
) -> str:
    """The token counts that a kernel ran with, or why it was refused."""
    if how == "declared":
        return _declared(requires, tmp_path, monkeypatch)
    requirement = eval(requires, NAMES) if how == "data" else Written(requires)
    strategy = Strategy(
        test_token_rules.ADD,
        "acme.counted",
        test_token_rules.counted,
        (requirement,),
        outputs=token_counts.OUTPUTS,
        batch_invariant=True,
    )
    using = token_counts.acme(monkeypatch, strategy, config=FusionConfig(**config))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        verdict = _compiled(how, using, counts, expected)
    warned = [str(each.message) for each in heard if "acme.counted: requirement" in str(each.message)]
    if ANSWER in verdict and not any(verdict.removeprefix("refused: ") in each for each in warned):
        return f"silence: {verdict}"
    return verdict


def _compiled(how: str, using: Registry, counts: Sequence[int], expected: str) -> str:
    if how == "fixed":
        return _refused(fuse(token_counts.model, *token_counts.given(counts[0]), using=using).site) or "right"
    dynamic = token_counts.Dynamic(token_counts.model, using)
    ran = test_token_rules.ran_with(dynamic, counts)  # asserts the numbers of each call
    if len(dynamic.reports) > 1:
        return f"a guard: {len(dynamic.reports)} graphs"
    if refusal := _refused(dynamic.reports[0].sites[0]):
        return refusal
    wanted = [count for count in counts if eval(expected, {"t": count})]
    return f"right: {len(ran)} of {len(counts)} counts" if ran == wanted else f"ran with {ran}, needs {wanted}"


def _refused(site: Any) -> str:
    decision = next(each for each in site.decisions if each.strategy == "acme.counted")
    return "" if decision.stage is Stage.CHOSEN else f"refused: {decision.reasons[0]}"


def _declared(source: str, tmp_path: Path, monkeypatch: Any) -> str:
    """The failure of loading a plugin that builds this requirement."""
    (tmp_path / "declaring.py").write_text(f"import fusion_core\nREQUIRES = fusion_core.{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("declaring", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        registry = Registry.of([REFERENCE, EntryPoint("acme", "declaring", "fusion_core.backends")], FusionConfig())
    failures = [str(failure.reason) for failure in registry.failures]
    return f"refused: {'; '.join(failures)}" if failures else "right"


def _declares(source: str, message: str) -> Fault:
    fault = f"a plugin declares {source}"
    return Fault("requirements", source, fault, f"refused: {message}", {"how": "declared", "requires": source})


def _rule(name: str, requires: str, expected: str, *, how: str = "rule", slow: bool = True, **given: Any) -> Fault:
    given = {"how": how, "requires": requires, "expected": expected, **given}
    return Fault("requirements", name, f"unmet: {requires}", r"right: \d+ of \d+ counts", given, slow)


def _refuses(name: str, requires: str, reason: str, *, how: str = "fixed", slow: bool = False, **given: Any) -> Fault:
    return Fault(
        "requirements",
        name,
        f"unmet: {requires}",
        f"refused: {reason}",
        {"how": how, "requires": requires, **given},
        slow,
    )


ANSWER = "needs a Reason or None at any site"

ROWS = (
    _declares("Tokens()", "Tokens has no limit, needs most, least or multiple_of"),
    _declares("Tokens(most=0)", "most of Tokens is 0, needs a whole number of at least 1"),
    _declares("Tokens(most=8.0)", r"most of Tokens is 8\.0, needs a whole number of at least 1"),
    _declares("Tokens(least=-1)", "least of Tokens is -1, needs a whole number of at least 0"),
    _declares("Tokens(multiple_of=True)", "multiple_of of Tokens is True, needs a whole number of at least 1"),
    _declares("Tokens(most='8')", "most of Tokens is '8', needs a whole number of at least 1"),
    _declares("Tokens(8, 9)", "Tokens has no count that is 9 to 8 tokens, needs bounds with one between them"),
    _declares("Tokens(7, multiple_of=8)", "Tokens has no count that is at most 7 tokens, in multiples of 8, needs .*"),
    _refuses("raises", "1 / 0", f"requirement '1 / 0' raised ZeroDivisionError: division by zero, {ANSWER}"),
    _refuses("ends the process", "sys.exit(3)", rf"requirement 'sys.exit\(3\)' raised SystemExit: 3, {ANSWER}"),
    _refuses("gives text", "'no'", f"requirement ''no'' gave str 'no', {ANSWER}"),
    _refuses("gives a number", "7", f"requirement '7' gave int '7', {ANSWER}"),
    _refuses("raises in a graph of any count", "1 / 0", f"requirement '1 / 0' raised Zero.*, {ANSWER}", how="rule"),
    _refuses("refuses an unknown count", "s.tokens is not None", "not met", how="rule", slow=True),
    _refuses(
        "deterministic",
        "s.tokens <= 8",
        "acme.counted runs at some numbers of tokens only .*",
        numerics="deterministic",
    ),
    _rule("multiple of 4", "s.tokens % 4 == 0", "t % 4 == 0", slow=False),
    _rule("odd", "s.tokens % 2 == 1", "t % 2 == 1"),
    _rule("a range", "5 <= s.tokens <= 64", "5 <= t <= 64"),
    _rule("two ranges", "s.tokens < 5 or 16 <= s.tokens <= 33", "t < 5 or 16 <= t <= 33"),
    _rule("bytes", "s.tokens * x.shape[-1] <= 1000", "t * 16 <= 1000"),
    _rule("a size compared", "x.shape[0] > 5", "t > 5", slow=False),
    _rule("a size as a number", "int(x.shape[0]) % 3 == 0", "t % 3 == 0"),
    _rule("a size in a list", "x.shape[0] in (4, 8)", "t in (4, 8)"),
    _rule("a shape compared", "x.shape == (8, 16)", "t == 8"),
    _rule("a shape in a set", "x.shape in {(8, 16), (9, 16)}", "t in (8, 9)"),
    _refuses("a shape as text", "'[8, ' in str(x)", "not met", how="rule", slow=True),
    _rule("an error swallowed", "unknown(x.shape[0])", "t > 5"),
    _rule("None lets pass", "s.tokens is None or s.tokens > 15", "t > 15"),
    _rule("raises at one count", "1 / (s.tokens - 7) != 0", "t != 7"),
    _rule("strides alone", "x.stride[0] == 16", "True"),
    _rule("Tokens: both bounds", "Tokens(most=64, least=5)", "5 <= t <= 64", how="data"),
    _rule("Tokens: multiples", "Tokens(multiple_of=8, most=100)", "t % 8 == 0 and t <= 100", how="data", slow=False),
    _rule("SizeBetween on rows", "SizeBetween('x', 0, 3, 17)", "3 <= t <= 17", how="data"),
    _rule("MultipleOf on rows", "MultipleOf('x', 0, 3)", "t % 3 == 0", how="data"),
    _rule("Contiguous", "Contiguous('x')", "True", how="data"),
)
