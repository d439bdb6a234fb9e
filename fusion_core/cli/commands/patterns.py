"""``fusion-core patterns``: the patterns that can be fused, and the backends that run them."""

from __future__ import annotations

import inspect
import warnings
from typing import Annotated, Any

import typer

from fusion_core.cli.options import Json, make_config
from fusion_core.cli.output import print_json
from fusion_core.errors import ConfigError, PatternError
from fusion_core.patterns.definition import Pattern
from fusion_core.plugins.registry import Registry
from fusion_core.plugins.support_table import support_cells, support_table


def patterns(
    name: Annotated[str | None, typer.Argument(help="Show only this pattern, in full.", show_default=False)] = None,
    support: Annotated[
        bool,
        typer.Option("--support", help="Print which backend runs which pattern, and what it requires, as Markdown."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the patterns: what each computes, its inputs and its outputs."""
    if name is not None and support:
        raise ConfigError(f"the call has both the name {name!r} and --support, needs one of them")
    config = make_config()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the command backends shows why a backend does not load
        registry = Registry.load(config)
    if name is not None and name not in registry.patterns:
        raise PatternError(f"pattern {name!r} is unknown, needs one of {', '.join(registry.patterns)}")
    chosen = [registry.patterns[name]] if name is not None else list(registry.patterns.values())
    if support:
        if as_json:
            print_json({"support": support_cells(registry)})
        else:
            typer.echo(support_table(registry))
    elif as_json:
        print_json({"patterns": [_facts(pattern) for pattern in chosen]})
    elif name is not None:
        typer.echo(f"{_head(chosen[0])}\n\n{_doc(chosen[0])}")
    else:
        typer.echo("\n\n".join(f"{_head(pattern)}\n  {_formula(pattern)}" for pattern in chosen))


def _head(pattern: Pattern) -> str:
    return "\n".join(
        (
            pattern.name,
            f"  signature  {pattern.signature()}",
            f"  outputs    {', '.join(pattern.outputs)}",
            f"  words      {' -> '.join(pattern.words)}",
        )
    )


def _facts(pattern: Pattern) -> dict[str, Any]:
    return {
        "name": pattern.name,
        "signature": pattern.signature(),
        "outputs": list(pattern.outputs),
        "returns": list(pattern.returns),
        "words": list(pattern.words),
        "formula": _formula(pattern),
        "doc": _doc(pattern),
    }


def _doc(pattern: Pattern) -> str:
    return (inspect.getdoc(pattern.function) or "").replace("``", "")


def _formula(pattern: Pattern) -> str:
    return _doc(pattern).partition("\n")[0]
