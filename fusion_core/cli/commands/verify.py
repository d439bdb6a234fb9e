"""``fusion-core verify``: runs the conformance kit on one backend, without pytest."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_core.cli import machine
from fusion_core.cli.options import Json
from fusion_core.cli.output import Stages, print_json, show, table
from fusion_core.config import FusionConfig
from fusion_core.errors import ConfigError
from fusion_core.site import Device

if TYPE_CHECKING:
    from fusion_core.testing import Check, Subject

_MARKS = {"passed": "ok", "failed": "FAILED", "skipped": "skip", "not applicable": "–"}


def verify(
    backend: Annotated[str, typer.Argument(help="Name of the backend's entry point.")],
    examples: Annotated[int, typer.Option(min=1, help="Generated examples for each check.")] = 20,
    check: Annotated[list[str] | None, typer.Option(help="Only this check; may be given several times.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="Only this strategy; may be given several times.")] = None,
    example: Annotated[
        str | None, typer.Option(help="Only this example of one check, as its failure prints it.")
    ] = None,
    entry_point: Annotated[
        str | None, typer.Option(help='The plugin as "package.module:object", if no distribution registers it.')
    ] = None,
    as_json: Json = False,
) -> None:
    """Check on this machine that a backend's strategies do what they declare.

    Checks that cannot run here are skipped with a reason; under FUSION_CORE_STRICT=1 they fail. Exit status 1 if a
    check fails. With --json the answer also describes this machine: attach it to a bug report.
    """
    if importlib.util.find_spec("hypothesis") is None:
        raise ConfigError("hypothesis is not installed, needs the testing extra; pip install 'fusion-core[testing]'")
    strict = FusionConfig().strict
    import hypothesis

    from fusion_core.testing import CHECKS, pools, subjects

    chosen = [each for each in CHECKS if not check or each.name in check]
    if unknown := sorted(set(check or ()) - {each.name for each in CHECKS}):
        raise ConfigError(f"--check is {', '.join(unknown)}, needs names among {', '.join(e.name for e in CHECKS)}")
    if example is not None and (len(chosen) != 1 or len(strategy or ()) != 1):
        raise ConfigError("--example is of one check and strategy, needs --check and --strategy once each")
    rows = []
    quiet = [hypothesis.HealthCheck.too_slow]
    profile = hypothesis.settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)
    hypothesis.settings.register_profile("fusion-core verify", parent=profile)
    hypothesis.settings.load_profile("fusion-core verify")
    every = subjects(backend, entry_point)
    if not every:
        raise ConfigError(f"backend {backend!r} has no strategies, needs some to verify")
    if unknown := sorted(set(strategy or ()) - {each.name for each in every}):
        names = ", ".join(each.name for each in every)
        raise ConfigError(f"--strategy is {', '.join(unknown)}, needs names among {names}")
    found = [each for each in every if not strategy or each.name in strategy]
    try:
        with Stages() as stages:
            for subject in found:
                with stages.stage(str(subject), str(subject)):
                    rows.append(_row(subject, chosen, strict, example))
    finally:
        pools.close()
    failed = sum(result["outcome"] == "failed" for row in rows for result in row["checks"].values())
    if as_json:
        answer = {"backend": backend, "examples": examples, "strict": strict, "failed": failed}
        print_json({**answer, "machine": machine.machine(), "usable": _usable(found[0]), "strategies": rows})
    else:
        _show(rows)
    if failed:
        raise typer.Exit(1)


def _usable(subject: Subject) -> dict[str, Any]:
    """The reasons why the backend cannot be used on this machine's device, and its memory there."""
    device, registry = Device.here(), subject.registry
    reasons = [reason.to_dict() for reason in registry.unavailable(subject.backend, device)]
    return {"reasons": reasons, "status": list(machine.held(registry, subject.backend, device))}


def _row(subject: Subject, checks: list[Check], strict: bool, only: str | None) -> dict[str, Any]:
    """The outcome of every check for one strategy, as plain JSON types."""
    results = {each.name: _outcome(subject, each, strict, only) for each in checks}
    return {"strategy": subject.strategy.name, "pattern": subject.pattern.name, "checks": results}


def _outcome(subject: Subject, check: Check, strict: bool, only: str | None) -> dict[str, str]:
    from fusion_core.testing import CheckFailed, CheckNotApplicable, CheckSkipped

    try:
        check.run(subject, only)
    except CheckNotApplicable as nothing:
        return {"outcome": "not applicable", "why": str(nothing)}
    except CheckSkipped as skipped:
        if strict:
            return {"outcome": "failed", "why": f"{skipped}; FUSION_CORE_STRICT is set: what cannot run here fails"}
        return {"outcome": "skipped", "why": str(skipped)}
    except CheckFailed as failed:
        return {"outcome": "failed", "why": str(failed)}
    return {"outcome": "passed", "why": ""}


def _show(rows: list[dict[str, Any]]) -> None:
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
        reasons: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            for name, result in row["checks"].items():
                if result["outcome"] == outcome:
                    # a message that several strategies share is printed once
                    why = result["why"].removeprefix(row["strategy"]).lstrip(": ")
                    reasons.setdefault(why, {}).setdefault(name, []).append(row["strategy"])
        if reasons:
            typer.echo(f"{os.linesep}{outcome}")
        for why, places in reasons.items():
            strategies = list(dict.fromkeys(each for found in places.values() for each in found))
            typer.echo(f"  {_few(list(places))} ({_few(strategies)}): {why}")
    outcomes = Counter(result["outcome"] for row in rows for result in row["checks"].values())
    words = {"failed": "failed", "skipped": "cannot run here", "not applicable": "do not apply"}
    rest = [f"{outcomes[each]} {word}" for each, word in words.items() if outcomes[each] or each == "failed"]
    typer.echo(f"{os.linesep}{outcomes['passed']} of {outcomes.total()} checks passed, {', '.join(rest)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
