"""The support table: which backend runs which pattern, and what it requires, from the declarations themselves."""

from __future__ import annotations

from fusion_core.errors import shown
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.strategy import Strategy

ANY = "any"
NONE = "—"


def support_table(registry: Registry) -> str:
    """The support table as Markdown, without a trailing newline.

    A row for each pattern, a column for each backend in the order in which they are tried. A cell says what the
    backend requires of a place: "any" where nothing, "—" where it has no strategy for the pattern. Of several
    strategies it says first what all of them require, then what each requires beside that.
    """
    rows = [["pattern", *registry.backends], ["---"] * (1 + len(registry.backends))]
    for pattern, cells in support_cells(registry).items():
        rows.append([f"`{pattern}`", *(_markdown(strategies) for strategies in cells.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def support_cells(registry: Registry) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Pattern → backend → strategy → what it requires, its option and whether it is untested; plain JSON types."""
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
    said = [shown(requirement, str) for requirement in (*strategy.requires, *strategy.implied(pattern))]
    said += [f"option {strategy.switch}"] if strategy.switch is not None else []
    said += [f"untested on hardware: {strategy.untested}"] if strategy.untested is not None else []
    return list(dict.fromkeys(said))


def _markdown(strategies: dict[str, list[str]]) -> str:
    if len(strategies) < 2:
        return next(map(_text, strategies.values()), NONE)
    first, *others = strategies.values()
    common = [each for each in first if all(each in other for other in others)]
    lines = [_text(common)] if common else []
    for name, requires in strategies.items():
        own = [each for each in requires if each not in common]
        lines.append(f"`{name}`: {_text(own) if own or not common else 'nothing else'}")
    return "<br>".join(lines)


def _text(requires: list[str]) -> str:
    return "; ".join(requires).replace("|", "\\|") or ANY
