"""The support table: which backend runs which pattern, and what it requires, from the declarations themselves."""

from __future__ import annotations

from fusion_core.patterns.definition import Pattern
from fusion_core.registry import Registry
from fusion_core.strategy import Strategy

ANY = "any"
NONE = "—"


def support_table(registry: Registry) -> str:
    """The support table as Markdown, without a trailing newline.

    A row for each pattern, a column for each backend in the order in which they are tried. A cell says what the
    backend requires of a place: "any" where nothing, "—" where it has no strategy for the pattern.
    """
    rows = [["pattern", *registry.backends], ["---"] * (1 + len(registry.backends))]
    for pattern, cells in support_cells(registry).items():
        rows.append([f"`{pattern}`", *(_markdown(strategies) for strategies in cells.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def support_cells(registry: Registry) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Pattern → backend → strategy → what it requires, as plain JSON types."""
    return {
        pattern.name: {
            backend.name: {
                strategy.name: _requires(strategy, pattern)
                for strategy in sorted(backend.strategies, key=lambda strategy: -strategy.rank)
                if strategy.pattern == pattern.name
            }
            for backend in registry.backends.values()
        }
        for pattern in registry.patterns.values()
    }


def _requires(strategy: Strategy, pattern: Pattern) -> list[str]:
    return list(dict.fromkeys(str(requirement) for requirement in (*strategy.requires, *strategy.implied(pattern))))


def _markdown(strategies: dict[str, list[str]]) -> str:
    texts = {name: "; ".join(requires).replace("|", "\\|") or ANY for name, requires in strategies.items()}
    if len(texts) < 2:
        return next(iter(texts.values()), NONE)
    return "<br>".join(f"`{name}`: {text}" for name, text in texts.items())
