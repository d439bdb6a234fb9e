"""Whether a strategy can run at a site, and whether it should."""

from __future__ import annotations

from collections.abc import Callable

from fusion_core.config import DETERMINISTIC
from fusion_core.decision import Figure
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.asking import looks_at_tokens, said
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy
from fusion_core.reason import Reason, Stage
from fusion_core.site import Site


def weigh(
    strategy: Strategy, pattern: Pattern, site: Site | Reason, registry: Registry, found: Figure | None = None
) -> tuple[Stage, tuple[Reason, ...]]:
    """How far one strategy gets at one site by itself; `Stage.CHOSEN` where nothing speaks against it.

    Args:
        strategy: The strategy.
        pattern: Its pattern.
        site: Where that stands, or why it does not.
        registry: What is installed and configured.
        found: What was measured of it there.
    """
    stage, reasons = able(strategy, pattern, site, registry)
    if stage is not Stage.CHOSEN:
        return stage, reasons
    assert isinstance(site, Site)
    return worth(strategy, site, registry, found)


def worth(strategy: Strategy, site: Site, registry: Registry, found: Figure | None) -> tuple[Stage, tuple[Reason, ...]]:
    """Whether a strategy that can run at a site of known size should, and may: `Stage.CHOSEN`, or why not."""
    if reasons := unprofitable(strategy, site, registry, found):
        return Stage.WORTHWHILE, reasons
    if reasons := strategy.switched_off(registry.config):
        return Stage.OPTION, reasons
    return Stage.CHOSEN, ()


def able(
    strategy: Strategy, pattern: Pattern, site: Site | Reason, registry: Registry
) -> tuple[Stage, tuple[Reason, ...]]:
    """Whether a strategy can run at a site, whatever it costs: `Stage.CHOSEN`, or how far it gets and why not on."""
    if isinstance(site, Site) and (reasons := registry.unavailable(strategy.backend, site.device)):
        return Stage.UNAVAILABLE, reasons
    if isinstance(site, Reason):
        return Stage.STRUCTURE, (site,)
    reasons = strategy.cannot(site, pattern)
    if registry.config.numerics == DETERMINISTIC:
        reasons += _not_for_every_batch(strategy, site)
    return (Stage.REQUIRES, reasons) if reasons else (Stage.CHOSEN, ())


def _not_for_every_batch(strategy: Strategy, site: Site) -> tuple[Reason, ...]:
    """Why a strategy gives a row other bits in another batch, or does not run there at all."""
    hint = "numerics='default' allows it"
    if not strategy.batch_invariant:
        found = f"{strategy.name} may give a row other bits in another batch"
        return (Reason("numerics", found, "a batch-invariant strategy", hint=hint),)
    limits = [said(each) for each in strategy.requires if looks_at_tokens(each, site)]
    found = f"{strategy.name} runs at some numbers of tokens only ({'; '.join(limits)})"
    return (Reason("numerics", found, "one that runs in every batch", hint=hint),) if limits else ()


def unprofitable(
    strategy: Strategy,
    site: Site,
    registry: Registry,
    found: Figure | None,
    declared: Callable[[], tuple[Reason, ...]] | None = None,
) -> tuple[Reason, ...]:
    """Why a strategy that can run at a site of known size should not. What was measured goes before what is declared.

    Never for deterministic numerics: nothing about the batch may decide there.

    Args:
        strategy: The strategy.
        site: The site.
        registry: What is installed and configured.
        found: What was measured of it there.
        declared: What it declares there; None to ask it.
    """
    config = registry.config
    if config.numerics == DETERMINISTIC:
        return ()
    tokens = site.tokens
    takes = "max_tokens" in strategy.settings(registry.patterns[strategy.pattern], config)
    if takes and config.max_tokens is not None and tokens is not None and tokens > config.max_tokens:
        return (Reason("max_tokens", f"{tokens} tokens are more than max_tokens", f"at most {config.max_tokens}"),)
    if found is None:
        return strategy.should_not(site) if declared is None else declared()
    slower = found.slower()
    return () if slower is None else (slower,)
