"""Whether a strategy can run at a site, and whether it should."""

from __future__ import annotations

from collections.abc import Callable

from fusion_core.config import DETERMINISTIC
from fusion_core.decision import Timing
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.asking import Answers, looks_at_tokens, text_of
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason, Stage
from fusion_core.site import Site


def evaluate(
    strategy: Strategy, pattern: Pattern, answers: Answers, registry: Registry, found: Timing | None = None
) -> tuple[Stage, tuple[Reason, ...]]:
    """How far one strategy gets at one site, regardless of others; `Stage.CHOSEN` if nothing speaks against it.

    Args:
        strategy: The strategy.
        pattern: Its pattern.
        answers: The answers of its site.
        registry: The installed backends and the configuration.
        found: Its timing at the site; None if it was not measured.
    """
    stage, reasons = can_run(strategy, pattern, answers, registry)
    return should_run(strategy, answers, registry, found) if stage is Stage.CHOSEN else (stage, reasons)


def should_run(
    strategy: Strategy, answers: Answers, registry: Registry, found: Timing | None
) -> tuple[Stage, tuple[Reason, ...]]:
    """Whether a strategy that can run at a site of known size should, and may: `Stage.CHOSEN`, or why not."""
    if reasons := why_not_faster(strategy, answers.site, registry, found, lambda: answers.unmet(strategy.worthwhile)):
        return Stage.WORTHWHILE, reasons
    if reasons := strategy.switched_off(registry.config):
        return Stage.OPTION, reasons
    return Stage.CHOSEN, ()


def can_run(
    strategy: Strategy, pattern: Pattern, where: Answers | Reason, registry: Registry
) -> tuple[Stage, tuple[Reason, ...]]:
    """Whether a strategy can run at a site, regardless of speed: `Stage.CHOSEN`, or the stage that it fails and why.

    Args:
        strategy: The strategy.
        pattern: Its pattern.
        where: The answers of its site, or the reason why the pattern does not match.
        registry: The installed backends and the configuration.
    """
    if isinstance(where, Reason):
        return Stage.STRUCTURE, (where,)
    if reasons := registry.unavailable(strategy.backend, where.site.device):
        return Stage.UNAVAILABLE, reasons
    reasons = strategy.unmet(where, pattern)
    if registry.config.numerics == DETERMINISTIC:
        reasons += _not_for_every_batch(strategy, where.site)
    return (Stage.REQUIRES, reasons) if reasons else (Stage.CHOSEN, ())


def _not_for_every_batch(strategy: Strategy, site: Site) -> tuple[Reason, ...]:
    """Why a strategy may give a row other bits in another batch, or not run there at all."""
    hint = "numerics='default' allows it"
    if not strategy.batch_invariant:
        found = f"{strategy.name} may give a row other bits in another batch"
        return (Reason("numerics", found, "a batch-invariant strategy", hint=hint),)
    limits = [text_of(each) for each in strategy.requires if looks_at_tokens(each, site)]
    found = f"{strategy.name} runs at some numbers of tokens only ({'; '.join(limits)})"
    return (Reason("numerics", found, "one that runs in every batch", hint=hint),) if limits else ()


def why_not_faster(
    strategy: Strategy,
    site: Site,
    registry: Registry,
    found: Timing | None,
    declared: Callable[[], tuple[Reason, ...]],
) -> tuple[Reason, ...]:
    """Why a strategy that can run at a site of known size should not. Measurements take precedence over declarations.

    Empty for deterministic numerics: there the choice must not depend on the batch.

    Args:
        strategy: The strategy.
        site: The site.
        registry: The installed backends and the configuration.
        found: The strategy's timing at the site; None if it was not measured.
        declared: Returns why the strategy's own ``worthwhile`` is unmet there.
    """
    config = registry.config
    if config.numerics == DETERMINISTIC:
        return ()
    tokens = site.tokens
    takes = "max_tokens" in strategy.settings(registry.patterns[strategy.pattern], config)
    if takes and config.max_tokens is not None and tokens is not None and tokens > config.max_tokens:
        return (Reason("max_tokens", f"{tokens} tokens are more than max_tokens", f"at most {config.max_tokens}"),)
    if found is None:
        return declared()
    slower = found.slower()
    return () if slower is None else (slower,)
