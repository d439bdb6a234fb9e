"""What each requirement of AITER's strategies keeps away: a program of `test_needed`.

Strategies run at the sites just outside of each of its requirements, over the model and as if it were met. Prints a JSON
object: "strategy: requirement's class" → what happened at any of them, of

- ``wrong``: results beyond the pattern's tolerance, or of another form;
- ``raised``: a rank raised, died or hung;
- ``unfused``: the operator itself ran torch's all_reduce instead, right and slower than without fusion;
- ``right``: fused and right.

The self-check at first use, which would send most of them to the unfused path, is left out.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator

from fusion_core import Requirement, Site, Strategy, hookimpl
from fusion_core.errors import FusionError
from fusion_core.samples.sites import Impossible, fitted
from fusion_core.testing import CheckFailed, Subject, Values, example_site, pools, sides
from fusion_core.testing.checking import judge, run
from fusion_core.testing.jobs import Outcome, compare
from fusion_core.workspaces import lifecycle
from tests.aiter_backend import as_amd
from tests.aiter_backend.as_amd import fusion_available  # noqa: F401  # a hook

NAMES = (
    "aiter.all_reduce",
    "aiter.all_reduce_add_rms_norm",
    "aiter.all_reduce_rms_norm_token_fp8",
    "aiter.all_reduce_add_rms_norm_group_fp8_out",
    "aiter.all_reduce_add_rms_norm_mxfp4",
)
"""One strategy for each kind of kernel."""
HERE = "tests.aiter_backend.without"
VALUES = Values(rows=("normal", "tiny", "small", "zeros"))
WORLDS = (1, 2, 3, 4, 6)

VARIANTS = [each for strategy in as_amd.STRATEGIES for each in strategy.expanded()]

lifecycle.why_not_used = lambda *given, **named: None  # type: ignore[assignment]


@hookimpl
def fusion_strategies() -> tuple[Strategy, ...]:
    return tuple(dataclasses.replace(strategy, requires=()) for strategy in VARIANTS)


def outside(strategy: Strategy, requirement: Requirement) -> Iterator[Site]:
    """The sites just outside of a requirement that this machine can run."""
    subject = Subject("aiter", strategy.name, HERE)
    base = example_site(subject.pattern, strategy, device=as_amd.HERE)
    for variant in sides(requirement, base).unmet:
        try:
            site = fitted(subject.pattern, base, variant)
        except Impossible:
            continue
        if site.device == as_amd.HERE and site.world_size in WORLDS:
            yield site


def counted(subject: Subject, site: Site, values: Values) -> tuple[Outcome, int]:
    """One example, and how many of AITER's kernels it ran."""
    import aiter

    aiter.calls.clear()
    outcome = compare(subject, site, values)
    return outcome, sum(call["method"].startswith(("fused", "all_reduce")) for call in aiter.calls)


def happens(strategy: Strategy, site: Site) -> str:
    subject = Subject("aiter", strategy.name, HERE)
    try:
        by_rank = run(subject, site, counted, VALUES)
    except CheckFailed:
        return "raised"
    try:
        judge(subject, site, VALUES, [outcome for outcome, _ in by_rank])
    except FusionError:
        return "wrong"
    return "right" if all(count for _, count in by_rank) else "unfused"


def main() -> None:
    found: dict[str, list[str]] = {}
    for strategy in VARIANTS:
        for requirement in strategy.requires if strategy.name in NAMES else ():
            seen: set[str] = set()
            for site in outside(strategy, requirement):
                seen.add(happens(strategy, site))
                if seen & {"wrong", "raised"}:
                    break  # enough; new workers cost seconds
            found[f"{strategy.name}: {type(requirement).__name__}"] = sorted(seen)
    pools.close()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    from tests.aiter_backend import without  # workers import it by this name

    without.main()
