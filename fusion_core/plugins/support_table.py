"""The support table: which backend runs which pattern, and what it requires, from the declarations themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fusion_core.errors import shown
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.loader import Backend
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.requirements import LiveOutputs
from fusion_core.plugins.strategy import Strategy

NONE = "—"
NOTHING = "nothing"
PLAIN = "plain"
UNTESTED = "untested"
YES = "yes"


def support_table(registry: Registry) -> str:
    """The support table as Markdown, without a trailing newline.

    First comes a table of patterns and backends, then for each backend the requirements of its strategies. Those that
    all of its strategies share are printed once. So are those that all variants of a strategy share, and those that all
    variants of one name share.
    """
    sections = [_section(backend, registry) for backend in registry.backends.values() if backend.declared]
    return "\n\n".join([_overview(registry), *sections])


def support_cells(registry: Registry) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Pattern → backend → strategy → its requirements, its option and whether it is untested; plain JSON types."""
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
    words = [shown(requirement, str) for requirement in (*strategy.requires, *strategy.implied(pattern))]
    words += [f"option {strategy.switch}"] if strategy.switch is not None else []
    words += [f"untested on hardware: {strategy.untested}"] if strategy.untested is not None else []
    return list(dict.fromkeys(words))


def _overview(registry: Registry) -> str:
    rows = [
        [f"`{pattern}`", *(_state(backend.strategies, pattern) for backend in registry.backends.values())]
        for pattern in registry.patterns
    ]
    return _table(["pattern", *registry.backends], rows)


def _state(strategies: Iterable[Strategy], pattern: str) -> str:
    """A backend's support for a pattern while no option is switched on."""
    own = [each for each in strategies if each.pattern == pattern]
    ready = [each for each in own if each.option is None]
    if any(each.untested is None for each in ready):
        return YES
    return UNTESTED if ready else f"option {own[0].switch}" if own else NONE


def _section(backend: Backend, registry: Registry) -> str:
    every = [_Ways.of(strategy, registry.patterns[strategy.pattern]) for strategy in backend.declared]
    everywhere = _common([each.shared for each in every]) if len(every) > 1 else []
    suffixes = dict.fromkeys(suffix for each in every for suffix in each.own)
    by_suffix = {suffix: _common([each.own[suffix] for each in every if suffix in each.own]) for suffix in suffixes}
    rows: dict[tuple[str, str], list[str]] = {}
    for each in every:
        words = [*_without(each.shared, everywhere), *each.differences(by_suffix)]
        rows.setdefault((", ".join(each.outputs), _text(words)), []).append(each.title)
    parts = [f"## {backend.name}"]
    parts += [f"Every strategy requires: {_text(everywhere)}."] if everywhere else []
    head = ["strategy", "outputs", "requires besides" if everywhere else "requires"]
    parts.append(_table(head, [[", ".join(titles), *cells] for cells, titles in rows.items()]))
    if suffixes:
        parts.append(_table(["variant", "besides"], [[_quoted(n), _text(by_suffix[n])] for n in suffixes]))
    return "\n\n".join(parts)


@dataclass(frozen=True)
class _Ways:
    """The requirements of a strategy.

    Attributes:
        title: Its name, and its pattern if the name does not contain it.
        outputs: The outputs that every variant gives.
        shared: The requirements of every variant.
        own: Suffix of a variant's name → the further requirements of that variant. Empty without variants.
    """

    title: str
    outputs: Sequence[str]
    shared: list[str]
    own: dict[str, list[str]]

    @classmethod
    def of(cls, strategy: Strategy, pattern: Pattern) -> _Ways:
        expanded = strategy.expanded()
        given = [pattern.outputs if each.outputs is None else each.outputs for each in expanded]
        outputs = _common([list(each) for each in given])
        own = {}
        for place, each in enumerate(expanded):
            parts = (strategy, strategy.variants[place]) if strategy.variants else (strategy,)
            implied = [r for r in each.implied(pattern) if not isinstance(r, LiveOutputs)]  # the outputs are printed
            words = [shown(requirement, str) for requirement in (*each.requires, *implied)]
            words += [f"gives {name} too" for name in given[place] if name not in outputs]
            words += [f"option {each.switch}"] if each.switch is not None else []
            words += [f"untested on hardware: {part.untested}" for part in parts if part.untested is not None]
            own[each.name.removeprefix(strategy.name)] = list(dict.fromkeys(words))
        shared = _common(list(own.values()))
        named = strategy.name == f"{strategy.backend}.{pattern.name}"
        title = f"`{strategy.name}`" + ("" if named else f" (`{pattern.name}`)")
        own = {suffix: _without(words, shared) for suffix, words in own.items()} if strategy.variants else {}
        return cls(title, outputs, shared, own)

    def differences(self, by_suffix: Mapping[str, list[str]]) -> list[str]:
        """Requirements of variants that variants of the same name do not all share, with the variants' names."""
        found: dict[str, list[str]] = {}
        for suffix, requires in self.own.items():
            for words in _without(requires, by_suffix[suffix]):
                found.setdefault(words, []).append(suffix)
        return [f"{words} ({self._label(suffixes)})" for words, suffixes in found.items()]

    def _label(self, suffixes: list[str]) -> str:
        """Names of variants: ``_out…`` for all that begin so, and ``not _out…`` for all others."""
        others = [suffix for suffix in self.own if suffix not in suffixes]
        if "" in suffixes and (start := self._start(others)):
            return f"not `{start}`"
        start = self._start(suffixes)
        return f"`{start}`" if start else ", ".join(map(_quoted, suffixes))

    def _start(self, suffixes: list[str]) -> str:
        """A prefix that the names of these variants have and no others; empty if there is none."""
        first = min(suffixes, key=len, default="")
        alike = [suffix for suffix in self.own if suffix == first or suffix.startswith(f"{first}_")]
        return f"{first}{'…' * (len(alike) > 1)}" if first and alike == suffixes else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _quoted(suffix: str) -> str:
    return f"`{suffix}`" if suffix else PLAIN


def _common(lists: list[list[str]]) -> list[str]:
    return [each for each in lists[0] if all(each in other for other in lists)]


def _without(some: list[str], others: list[str]) -> list[str]:
    return [each for each in some if each not in others]


def _text(words: list[str]) -> str:
    return "; ".join(words).replace("|", "\\|") or NOTHING
