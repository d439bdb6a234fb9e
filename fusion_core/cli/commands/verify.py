"""``fusion-core verify``: the conformance kit on one backend, without pytest."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_core.cli.options import Json
from fusion_core.cli.output import Stages, print_json, show, table
from fusion_core.config import FusionConfig
from fusion_core.errors import ConfigError

if TYPE_CHECKING:
    from fusion_core.testing import Check, Subject

_MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "skipped", "not applicable": "–"}


def verify(
    backend: Annotated[str, typer.Argument(help="Name of the backend's entry point.")],
    examples: Annotated[int, typer.Option(min=1, help="Generated examples for each check.")] = 20,
    check: Annotated[list[str] | None, typer.Option(help="Only this check; may be given several times.")] = None,
    as_json: Json = False,
) -> None:
    """Check that a backend keeps what its strategies promise, on this machine.

    What cannot run here is skipped with its reason; with FUSION_CORE_STRICT=1 that is a failure. Exit status 1 where
    a check fails.
    """
    if importlib.util.find_spec("hypothesis") is None:
        raise ConfigError("hypothesis is not installed, needs the testing extra; pip install 'fusion-core[testing]'")
    strict = FusionConfig().strict
    import hypothesis

    from fusion_core.testing import CHECKS, pools, subjects

    chosen = [each for each in CHECKS if not check or each.name in check]
    if unknown := sorted(set(check or ()) - {each.name for each in CHECKS}):
        raise ConfigError(f"--check is {', '.join(unknown)}, needs names among {', '.join(e.name for e in CHECKS)}")
    rows = []
    quiet = [hypothesis.HealthCheck.too_slow]
    profile = hypothesis.settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)
    hypothesis.settings.register_profile("fusion-core verify", parent=profile)
    hypothesis.settings.load_profile("fusion-core verify")
    found = subjects(backend)
    if not found:
        raise ConfigError(f"backend {backend!r} has no strategies, needs some to verify")
    try:
        with Stages() as stages:
            for subject in found:
                with stages.stage(str(subject), str(subject)):
                    rows.append(_row(subject, chosen, strict))
    finally:
        pools.close()
    failed = sum(result["outcome"] == "failed" for row in rows for result in row["checks"].values())
    if as_json:
        print_json({"backend": backend, "examples": examples, "strict": strict, "failed": failed, "strategies": rows})
    else:
        _show(rows, failed)
    if failed:
        raise typer.Exit(1)


def _row(subject: Subject, checks: list[Check], strict: bool) -> dict[str, Any]:
    """Every check's outcome for one strategy, as plain JSON types."""
    results = {each.name: _outcome(subject, each, strict) for each in checks}
    return {"strategy": subject.strategy.name, "pattern": subject.pattern.name, "checks": results}


def _outcome(subject: Subject, check: Check, strict: bool) -> dict[str, str]:
    from fusion_core.testing import CheckFailed, CheckNotApplicable, CheckSkipped

    try:
        check.run(subject)
    except CheckNotApplicable as nothing:
        return {"outcome": "not applicable", "why": str(nothing)}
    except CheckSkipped as skipped:
        if strict:
            return {"outcome": "failed", "why": f"{skipped}; FUSION_CORE_STRICT is set: what cannot run here fails"}
        return {"outcome": "skipped", "why": str(skipped)}
    except CheckFailed as failed:
        return {"outcome": "failed", "why": str(failed)}
    return {"outcome": "passed", "why": ""}


def _show(rows: list[dict[str, Any]], failed: int) -> None:
    names = list(rows[0]["checks"])
    for number, name in enumerate(names, 1):
        typer.echo(f"  {number:2}  {name.replace('_', ' ')}")
    typer.echo("")
    grid = table("strategy", "pattern", *map(str, range(1, len(names) + 1)))
    for row in rows:
        marks = (_MARKS[row["checks"][name]["outcome"]] for name in names)
        grid.add_row(row["strategy"], row["pattern"], *marks)
    show(grid)
    for outcome in ("failed", "skipped", "not applicable"):
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            for name, result in row["checks"].items():
                if result["outcome"] == outcome:
                    reasons.setdefault((name, result["why"]), []).append(row["strategy"])
        if reasons:
            typer.echo(f"{os.linesep}{outcome}")
        for (name, why), strategies in reasons.items():
            places = ", ".join(strategies[:3]) + (f" and {len(strategies) - 3} more" if len(strategies) > 3 else "")
            typer.echo(f"  {name} ({places}): {why}")
    checks = sum(len(row["checks"]) for row in rows)
    typer.echo(f"{os.linesep}{checks - failed} of {checks} checks without a failure, {failed} failed")
